#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>

namespace async_device {

/// How the device behaves. Set by tests while it stands still; read by the threads that queue work and by the streams.
struct Settings {
  /// Before one task in `delay_one_in` a stream waits for up to `delay_us`, drawn anew from the seed at `delay_draw`.
  std::atomic<int64_t> delay_us{0};
  std::atomic<int64_t> delay_one_in{3};
  std::atomic<uint64_t> delay_seed{1};
  std::atomic<uint64_t> delay_draw{0};
  /// This stream waits before each of its tasks, besides.
  std::atomic<int64_t> slow_stream{-1};
  std::atomic<int64_t> slow_us{0};

  /// Freed memory is overwritten, in the order of its stream.
  std::atomic<bool> poison{true};
  /// A sender's stream is held until its message has a receiver, as NCCL's is by messages larger than its buffers.
  std::atomic<bool> rendezvous{true};

  /// Streams sleep for as long as an operator is said to take, and compute nothing.
  std::atomic<bool> sleeps{false};
  std::map<std::string, std::chrono::nanoseconds> takes;
  std::chrono::nanoseconds others_take{0};
  std::chrono::nanoseconds transfer_takes{0};
  /// The host is held up by a launch for at least so long.
  std::chrono::nanoseconds launch_takes{0};
};

Settings& settings();

/// How long an operator keeps its stream busy, where streams sleep.
std::chrono::nanoseconds duration_of(const std::string& name);

/// Numbers for tests: what was asked of the device since the process began.
struct Counts {
  std::atomic<uint64_t> tasks{0};
  std::atomic<uint64_t> waits{0};
  std::atomic<uint64_t> marks{0};
  std::atomic<uint64_t> launches{0};
  /// Operators for which the host had to wait, and other times when it waited for the device.
  std::atomic<uint64_t> synchronous{0};
  std::atomic<uint64_t> host_waits{0};
  std::atomic<uint64_t> poisoned{0};
};

Counts& counts();

}  // namespace async_device
