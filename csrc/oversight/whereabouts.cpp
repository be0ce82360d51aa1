#include "precompiled.h"

#include "oversight/whereabouts.h"

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <algorithm>
#include <cstring>
#include <new>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

namespace pp_runtime {

namespace {

constexpr int kStageBits = 24;

/// Numbers are kept one higher, so that an untouched line says nothing of a stage or a rank.
uint64_t pack_action(const Activity& activity) {
  return static_cast<uint64_t>(activity.operation + 1) | static_cast<uint64_t>(activity.stage + 1) << 8 |
         static_cast<uint64_t>(activity.microbatch + 1) << (8 + kStageBits);
}

uint64_t pack_counterpart(const Activity& activity) {
  return static_cast<uint64_t>(activity.peer + 1) | static_cast<uint64_t>(activity.other_stage + 1) << 32;
}

int32_t unpack(uint64_t word, int shift, int bits) {
  const uint64_t value = word >> shift & ((uint64_t{1} << bits) - 1);
  return static_cast<int32_t>(std::min<uint64_t>(value, INT32_MAX)) - 1;
}

}  // namespace

std::shared_ptr<Segment> Board::make(size_t ranks) {
  auto segment = Segment::create(bytes(ranks));
  for (size_t rank = 0; rank < ranks; ++rank) {
    new (segment->data() + rank * sizeof(Line)) Line;
  }
  return segment;
}

Board::Board(std::shared_ptr<Segment> segment, size_t ranks, size_t own_rank)
    : segment_(std::move(segment)), ranks_(ranks), own_rank_(own_rank) {
  if (segment_->bytes() < bytes(ranks_) || own_rank_ >= ranks_) {
    throw std::runtime_error("the board is too small for " + std::to_string(ranks_) + " ranks");
  }
  begin({});
}

Board::Line& Board::line(size_t rank) const { return *reinterpret_cast<Line*>(segment_->data() + rank * sizeof(Line)); }

void Board::begin(const Activity& activity, std::chrono::nanoseconds now) {
  Line& own = line(own_rank_);
  own.counterpart.store(pack_counterpart(activity), std::memory_order_relaxed);
  own.since_ns.store(now.count(), std::memory_order_relaxed);
  own.action.store(pack_action(activity), std::memory_order_release);
}

void Board::begin_call(const std::string& name, const Activity& activity, std::chrono::nanoseconds now) {
  Line& own = line(own_rank_);
  std::array<uint64_t, kNameWords> words{};
  std::memcpy(words.data(), name.data(), std::min(name.size(), sizeof(words)));
  for (size_t i = 0; i < kNameWords; ++i) {
    own.name[i].store(words[i], std::memory_order_relaxed);
  }
  begin(activity, now);
}

Whereabouts Board::read(size_t rank) const {
  if (rank >= ranks_) {
    throw std::out_of_range("there is no rank " + std::to_string(rank) + " on the board");
  }
  const Line& read = line(rank);
  const uint64_t action = read.action.load(std::memory_order_acquire);
  const uint64_t counterpart = read.counterpart.load(std::memory_order_relaxed);
  Whereabouts found{.activity = {.operation = std::clamp(unpack(action, 0, 8), 0, kEndOfStep),
                                 .stage = unpack(action, 8, kStageBits),
                                 .microbatch = unpack(action, 8 + kStageBits, 32),
                                 .peer = unpack(counterpart, 0, 32),
                                 .other_stage = unpack(counterpart, 32, 32)},
                    .name = {},
                    .since = std::chrono::nanoseconds(read.since_ns.load(std::memory_order_relaxed))};
  if (found.activity.operation == static_cast<int32_t>(Operation::kCall)) {
    std::array<uint64_t, kNameWords> words{};
    for (size_t i = 0; i < kNameWords; ++i) {
      words[i] = read.name[i].load(std::memory_order_relaxed);
    }
    const auto* text = reinterpret_cast<const char*>(words.data());
    found.name.assign(text, strnlen(text, sizeof(words)));
  }
  return found;
}

Reporter::Reporter(std::shared_ptr<Board> board, c10::intrusive_ptr<c10d::Store> store, std::string key,
                   std::chrono::nanoseconds patience)
    : board_(std::move(board)), store_(std::move(store)), key_(std::move(key)), patience_(patience), thread_([this] {
        run();
      }) {}

Reporter::~Reporter() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Reporter::set_patience(std::chrono::nanoseconds patience) {
  {
    const std::lock_guard lock(mutex_);
    patience_ = patience;
  }
  changed_.notify_all();
}

void Reporter::end_step() {
  if (told_.load(std::memory_order_relaxed)) {
    {
      const std::lock_guard lock(mutex_);
      look_now_ = true;
    }
    changed_.notify_all();
  }
}

void Reporter::run() {
  std::chrono::nanoseconds told_of{0};
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    const std::chrono::nanoseconds patience = patience_;
    look_now_ = false;
    lock.unlock();
    const Whereabouts now_at = board_->read_own();
    const bool long_there = std::chrono::steady_clock::now().time_since_epoch() - now_at.since > patience;
    try {
      if (long_there) {
        report(&now_at);
        told_of = now_at.since;
        told_ = true;
      } else if (told_ && now_at.since != told_of) {
        report(nullptr);
        told_ = false;
      }
    } catch (const std::exception&) {
      // The store is gone. Whoever waits meets that too, and says so.
      return;
    }
    lock.lock();
    changed_.wait_for(lock, patience / 2, [this, patience] { return stopping_ || look_now_ || patience_ != patience; });
  }
}

/// "operation stage microbatch peer other_stage since now name", the times in seconds of the wall clock; empty where
/// the rank went on.
void Reporter::report(const Whereabouts* whereabouts) {
  std::ostringstream text;
  if (whereabouts != nullptr) {
    const std::chrono::duration<double> ago = std::chrono::steady_clock::now().time_since_epoch() - whereabouts->since;
    const std::chrono::duration<double> wall_clock = std::chrono::system_clock::now().time_since_epoch();
    const Activity& activity = whereabouts->activity;
    text.precision(15);
    text << activity.operation << ' ' << activity.stage << ' ' << activity.microbatch << ' ' << activity.peer << ' '
         << activity.other_stage << ' ' << (wall_clock - ago).count() << ' ' << wall_clock.count() << ' '
         << whereabouts->name;
  }
  const std::string bytes = text.str();
  store_->set(key_, std::vector<uint8_t>(bytes.begin(), bytes.end()));
}

}  // namespace pp_runtime
