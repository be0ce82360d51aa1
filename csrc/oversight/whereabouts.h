#pragma once

#include "oversight/operation.h"
#include "oversight/segment.h"

#include <c10/util/intrusive_ptr.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace c10d {
class Store;
}

namespace pp_runtime {

/// What a rank is doing. The numbers are an Operation's, or one of these two.
constexpr int32_t kOutsideStep = static_cast<int32_t>(Operation::kCount);
constexpr int32_t kEndOfStep = kOutsideStep + 1;

struct Activity {
  int32_t operation = kOutsideStep;
  int32_t stage = -1;
  int32_t microbatch = -1;
  /// Of a send or receive: the other rank, and its stage.
  int32_t peer = -1;
  int32_t other_stage = -1;
};

struct Whereabouts {
  Activity activity;
  /// Of a call: what is called.
  std::string name;
  std::chrono::nanoseconds since{0};
};

/// Where every rank is, one cache line a rank: read by a rank that has waited too long for another.
///
/// Each rank writes its own line, two words and the time an action, and reads another's only when something is wrong.
/// Where the ranks share memory the segment is one for all, else each has its own and a Reporter speaks for it.
class Board {
 public:
  static std::shared_ptr<Segment> make(size_t ranks);
  static size_t bytes(size_t ranks) { return ranks * sizeof(Line); }
  /// `segment` may come from another process; throws std::runtime_error where it is too small for the ranks.
  Board(std::shared_ptr<Segment> segment, size_t ranks, size_t own_rank);

  /// Called by the executor's thread at each action.
  void begin(const Activity& activity) { begin(activity, std::chrono::steady_clock::now().time_since_epoch()); }
  void begin(const Activity& activity, std::chrono::nanoseconds now);
  void begin_call(const std::string& name, const Activity& activity, std::chrono::nanoseconds now);

  /// Any thread. What is there need not be what a rank could have written; it is in range all the same.
  Whereabouts read(size_t rank) const;
  Whereabouts read_own() const { return read(own_rank_); }

 private:
  static constexpr size_t kNameWords = 5;
  struct alignas(64) Line {
    std::atomic<int64_t> since_ns{0};
    std::atomic<uint64_t> action{0};
    std::atomic<uint64_t> counterpart{0};
    std::array<std::atomic<uint64_t>, kNameWords> name{};
  };
  Line& line(size_t rank) const;

  std::shared_ptr<Segment> segment_;
  size_t ranks_;
  size_t own_rank_;
};

/// Tells the store where this rank is once it has been there for `patience`, for ranks that cannot read its board, and
/// says again that it still is there every half of that; so a report is no older than that where its rank died, and a
/// rank that went on has taken it back. A thread of its own, since the rank's threads may be in user code that never
/// returns; it sleeps all but always.
class Reporter {
 public:
  Reporter(std::shared_ptr<Board> board, c10::intrusive_ptr<c10d::Store> store, std::string key,
           std::chrono::nanoseconds patience);
  Reporter(const Reporter&) = delete;
  Reporter& operator=(const Reporter&) = delete;
  ~Reporter();

  void set_patience(std::chrono::nanoseconds patience);

  /// Takes back what was told of the step that has ended, now and not when the thread looks next. Costs one read where
  /// nothing was told.
  void end_step();

 private:
  void run();
  void report(const Whereabouts* whereabouts);

  std::shared_ptr<Board> board_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::string key_;
  std::chrono::nanoseconds patience_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  bool look_now_ = false;
  std::atomic<bool> told_{false};
  std::thread thread_;
};

}  // namespace pp_runtime
