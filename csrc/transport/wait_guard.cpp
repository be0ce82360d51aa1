#include "precompiled.h"

#include "transport/wait_guard.h"

#include <chrono>
#include <optional>
#include <string_view>
#include <typeinfo>
#include <utility>

namespace pp_runtime {

namespace {

constexpr std::chrono::milliseconds kGrace{500};
/// While waits follow each other the guard wakes by itself: waking it for each would cost more than a message.
constexpr std::chrono::milliseconds kIdleAfter{1000};

/// Whether work whose wait was aborted is as good as before. Gloo's headers are not among torch's, so its work is known
/// by name.
bool can_wait_again(const c10d::Work& work) {
  return std::string_view(typeid(work).name()).find("ProcessGroupGloo") != std::string_view::npos;
}

}  // namespace

WaitGuard::WaitGuard(std::shared_ptr<Watch> watch) : watch_(std::move(watch)), thread_([this] { run(); }) {}

WaitGuard::~WaitGuard() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void WaitGuard::run() {
  // A rank may end right after the last message that this one waits for, so its end counts only after some looks.
  int64_t looks_since_end = 0;
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (!waited_for_ && Watch::Clock::now() - since_ > kIdleAfter) {
      looks_since_end = 0;
      idle_ = true;
      changed_.wait(lock);
      idle_ = false;
      continue;
    }
    changed_.wait_for(lock, Watch::kInterval);
    if (!waited_for_ || Watch::Clock::now() - since_ < Watch::kInterval) {
      looks_since_end = 0;
      continue;
    }
    const auto work = waited_for_;
    const auto since = since_;
    lock.unlock();
    std::exception_ptr reason;
    const std::optional<int> ended = watch_->ended();
    try {
      watch_->look_for_failure(since);
      looks_since_end = ended ? looks_since_end + 1 : 0;
      if (looks_since_end > kGrace / Watch::kInterval) {
        watch_->throw_lost(*ended);
      }
    } catch (...) {
      reason = std::current_exception();
    }
    lock.lock();
    if (waited_for_ == work && (reason || can_wait_again(*work))) {
      reason_ = reason;
      woken_ = true;
      work->abort();
      if (reason) {
        waited_for_ = nullptr;
      }
    }
  }
}

void WaitGuard::wait(const c10::intrusive_ptr<c10d::Work>& work, int peer) {
  bool wakes = false;
  const auto since = Watch::Clock::now();
  {
    const std::lock_guard lock(mutex_);
    waited_for_ = work;
    since_ = since;
    reason_ = nullptr;
    woken_ = false;
    wakes = idle_;
  }
  if (wakes) {
    changed_.notify_all();
  }
  std::string error;
  std::exception_ptr reason;
  try {
    error = wait_between_signals(work);
  } catch (...) {
    reason = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    waited_for_ = nullptr;
    if (reason_) {
      reason = std::exchange(reason_, nullptr);
    }
  }
  if (reason) {
    std::rethrow_exception(reason);
  }
  if (!error.empty()) {
    report_broken_connection(peer, error);
  }
  watch_->add_wait(Watch::Clock::now() - since);
}

std::string WaitGuard::wait_between_signals(const c10::intrusive_ptr<c10d::Work>& work) {
  const auto was_woken = [this] {
    const std::lock_guard lock(mutex_);
    return !reason_ && std::exchange(woken_, false);
  };
  for (;;) {
    try {
      if (work->wait() || !was_woken()) {
        return {};
      }
    } catch (const std::exception& failure) {
      return failure.what();
    }
    watch_->check_signals();
  }
}

void WaitGuard::report_broken_connection(int peer, const std::string& error) {
  // Where the peer failed it said so before it went; give its word time to arrive.
  const auto until = Watch::Clock::now() + kGrace;
  try {
    do {
      watch_->look_for_failure(Watch::Clock::now());
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    } while (Watch::Clock::now() < until);
  } catch (const StoreLost&) {
    // The peer kept the store.
  }
  if (const std::optional<int> ended = watch_->ended()) {
    watch_->throw_lost(*ended);
  }
  throw PeerLost(peer, "the connection to rank " + std::to_string(peer) + " broke: " + error);
}

}  // namespace pp_runtime
