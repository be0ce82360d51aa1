#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace pp_runtime {

/// A counter in shared memory that one side raises and the other waits for: a short spin, then a futex.
///
/// The raiser makes a system call only where the waiter sleeps.
struct Doorbell {
  std::atomic<uint32_t> count{0};
  std::atomic<uint32_t> sleepers{0};

  void raise();

  /// Returns when count != seen, or after `sleep_limit` of sleep; whichever it was, the caller looks again.
  void wait(uint32_t seen, std::chrono::nanoseconds spin, std::chrono::nanoseconds sleep_limit);
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "a doorbell is shared between processes");

}  // namespace pp_runtime
