#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>

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

/// A wait was longer than the deadline.
struct WaitedTooLong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Python has a signal to deliver (Ctrl-C); the Python error is set when this is thrown.
struct Interrupted : std::exception {};

/// What a rank that waits looks at: the failure key of its runtime in the store, its own signals, its deadline.
///
/// Owned by the Runtime, shared by its channels. `look` is called from the executor's thread and from a channel's guard
/// thread, never on the way of a message that is there. The store is a clone of the group's, so a look never stands
/// behind somebody's blocking get.
class Watch {
 public:
  using Clock = std::chrono::steady_clock;

  Watch(c10::intrusive_ptr<c10d::Store> store, std::string failure_key, double deadline_seconds);

  /// How long a wait may sleep before it looks again.
  static constexpr std::chrono::milliseconds kInterval{50};

  /// Throws PeerFailed, WaitedTooLong or Interrupted. Called by a waiting rank every kInterval, without the GIL.
  void look(Clock::time_point waiting_since);

  /// The same without the signals: for any thread.
  void look_for_failure(Clock::time_point waiting_since);

  /// The published failure, or an empty text. Any thread.
  std::string failure();

  /// Publishes `record` unless another rank was first; returns the record that stands. Any thread.
  std::string publish(const std::string& record);

  void set_deadline(double seconds);

 private:
  std::mutex mutex_;
  c10::intrusive_ptr<c10d::Store> store_;
  std::string failure_key_;
  std::string seen_;
  std::atomic<double> deadline_seconds_;
};

}  // namespace pp_runtime
