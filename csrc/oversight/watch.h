#pragma once

#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace c10d {
class Store;
}

namespace pp_runtime {

/// Another rank failed; the text is its record as it published it (JSON, made and read in Python).
struct PeerFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A peer's process ended without a word.
struct PeerLost : std::runtime_error {
  PeerLost(int peer_rank, const std::string& what) : std::runtime_error(what), rank(peer_rank) {}
  int rank;
};

/// The store cannot be reached: the process that keeps it ended.
struct StoreLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A wait was longer than the deadline.
struct WaitedTooLong : std::runtime_error {
  WaitedTooLong(double waited, const std::string& what) : std::runtime_error(what), seconds(waited) {}
  double seconds;
};

/// What a rank that waits looks at: the failure key of its runtime in the store, its own signals, its deadline, and
/// whether the ranks on its host live.
///
/// Owned by the Runtime, shared by its channels. `look` is called from the executor's thread and from a channel's guard
/// thread, never on the way of a message that is there. The store is a clone of the group's, so a look never stands
/// behind somebody's blocking get.
class Watch {
 public:
  using Clock = std::chrono::steady_clock;

  /// `check_signals` runs on the thread that waits, and throws where the wait must end.
  Watch(c10::intrusive_ptr<c10d::Store> store, std::string failure_key, double deadline_seconds,
        std::function<void()> check_signals);
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
  ~Watch();

  /// How long a wait may sleep before it looks again.
  static constexpr std::chrono::milliseconds kInterval{50};

  /// Throws PeerFailed, WaitedTooLong, StoreLost or what the signals' check throws. Called by a waiting rank every
  /// kInterval, without the GIL.
  void look(Clock::time_point waiting_since);

  /// The same without the signals: for any thread.
  void look_for_failure(Clock::time_point waiting_since);

  void check_signals() const { check_signals_(); }

  /// Names the process of a rank on this host, so that its end is seen. Before any channel is made.
  void watch_process(int rank, int64_t pid);

  /// The rank of a watched process that has ended, also one that nobody has reaped. A rank that failed publishes it
  /// before it ends, so who asks this first and for a failure second knows the reason if there is one. Any thread.
  std::optional<int> ended() const;
  [[noreturn]] void throw_lost(int rank) const;

  /// The published failure, or an empty text. Any thread.
  std::string failure();

  /// Publishes `record` unless another rank was first; returns the record that stands. Any thread.
  std::string publish(const std::string& record);

  void set_deadline(double seconds);
  double deadline() const { return deadline_seconds_; }

  /// Adds a wait for another rank that has ended to what all waits took. Any thread.
  void add_wait(Clock::duration wait) { waited_.fetch_add(wait.count(), std::memory_order_relaxed); }
  std::chrono::nanoseconds waited() const { return Clock::duration(waited_.load(std::memory_order_relaxed)); }

 private:
  struct Process {
    int rank;
    int64_t pid;
    int handle;
  };

  std::mutex mutex_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::string failure_key_;
  std::string seen_;
  std::atomic<double> deadline_seconds_;
  std::atomic<Clock::rep> waited_{0};
  std::function<void()> check_signals_;
  std::vector<Process> processes_;
};

}  // namespace pp_runtime
