#pragma once

#include "oversight/watch.h"

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

namespace pp_runtime {

/// Wakes a thread that waits in a process group when another rank fails or the deadline passes.
///
/// A wait in gloo cannot be given a time-out of its own (gloo would close its connections), so a thread of the guard's
/// own looks at the watch meanwhile and aborts the work. One guard a runtime; it sleeps while nobody waits.
///
/// Signals can only be asked for on the waiting thread. Gloo's `abort` does no more than end the wait, which may then
/// begin again, so in gloo the guard wakes that thread now and then to ask.
class WaitGuard {
 public:
  explicit WaitGuard(std::shared_ptr<Watch> watch);
  ~WaitGuard();
  WaitGuard(const WaitGuard&) = delete;
  WaitGuard& operator=(const WaitGuard&) = delete;

  Watch& watch() const { return *watch_; }

  /// Waits for `work`; throws PeerFailed, WaitedTooLong, or PeerLost where the connection to `peer` broke. No GIL.
  void wait(const c10::intrusive_ptr<c10d::Work>& work, int peer);

  /// Posts an operation; one that the backend refuses since the connection broke is reported as such. No GIL.
  template <typename Post>
  c10::intrusive_ptr<c10d::Work> post(int peer, const Post& operation) {
    try {
      return operation();
    } catch (const std::exception& failure) {
      report_broken_connection(peer, failure.what());
    }
  }

 private:
  [[noreturn]] void report_broken_connection(int peer, const std::string& error);
  void run();
  /// What the backend said where the work failed, else an empty text.
  std::string wait_between_signals(const c10::intrusive_ptr<c10d::Work>& work);

  std::shared_ptr<Watch> watch_;
  std::mutex mutex_;
  std::condition_variable changed_;
  c10::intrusive_ptr<c10d::Work> waited_for_;
  Watch::Clock::time_point since_;
  std::exception_ptr reason_;
  bool woken_ = false;
  bool idle_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace pp_runtime
