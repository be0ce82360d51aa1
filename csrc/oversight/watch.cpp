#include "precompiled.h"

#include "oversight/watch.h"

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <sstream>
#include <utility>

namespace pp_runtime {

Watch::Watch(c10::intrusive_ptr<c10d::Store> store, std::string failure_key, double deadline_seconds,
             std::function<void()> check_signals)
    : store_(std::move(store)),
      failure_key_(std::move(failure_key)),
      deadline_seconds_(deadline_seconds),
      check_signals_(std::move(check_signals)) {}

Watch::~Watch() {
  for (const Process& process : processes_) {
    close(process.handle);
  }
}

void Watch::look(Clock::time_point waiting_since) {
  check_signals_();
  look_for_failure(waiting_since);
}

void Watch::look_for_failure(Clock::time_point waiting_since) {
  const std::string record = failure();
  if (!record.empty()) {
    throw PeerFailed(record);
  }
  const double waited = std::chrono::duration<double>(Clock::now() - waiting_since).count();
  if (waited > deadline_seconds_) {
    std::ostringstream text;
    text.precision(3);
    text << "waited " << waited << " s";
    throw WaitedTooLong(waited, text.str());
  }
}

void Watch::watch_process(int rank, int64_t pid) {
  // Some kernels and sandboxes give no handle; the deadline is left then.
  const int handle = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (handle >= 0) {
    processes_.push_back({.rank = rank, .pid = pid, .handle = handle});
  }
}

std::optional<int> Watch::ended() const {
  for (const Process& process : processes_) {
    pollfd state = {.fd = process.handle, .events = POLLIN, .revents = 0};
    if (poll(&state, 1, 0) > 0) {
      return process.rank;
    }
  }
  return std::nullopt;
}

void Watch::throw_lost(int rank) const {
  for (const Process& process : processes_) {
    if (process.rank == rank) {
      throw PeerLost(rank, "the process of rank " + std::to_string(rank) + " (pid " + std::to_string(process.pid) +
                               ") ended without a word: it was killed, or it crashed or left");
    }
  }
  throw PeerLost(rank, "the connection to rank " + std::to_string(rank) + " broke");
}

std::string Watch::failure() {
  const std::lock_guard lock(mutex_);
  if (seen_.empty()) {
    try {
      if (store_->check({failure_key_})) {
        const std::vector<uint8_t> bytes = store_->get(failure_key_);
        seen_.assign(bytes.begin(), bytes.end());
      }
    } catch (const std::exception& error) {
      throw StoreLost(error.what());
    }
  }
  return seen_;
}

std::string Watch::publish(const std::string& record) {
  const std::lock_guard lock(mutex_);
  if (seen_.empty()) {
    try {
      const std::vector<uint8_t> standing =
          store_->compareSet(failure_key_, std::vector<uint8_t>(), std::vector<uint8_t>(record.begin(), record.end()));
      seen_.assign(standing.begin(), standing.end());
    } catch (const std::exception& error) {
      throw StoreLost(error.what());
    }
  }
  return seen_;
}

void Watch::set_deadline(double seconds) { deadline_seconds_ = seconds; }

}  // namespace pp_runtime
