#include "transport/doorbell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace pp_runtime {

namespace {

void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Doorbell::raise() {
  count.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) != 0) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&count), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

void Doorbell::wait(uint32_t seen, std::chrono::nanoseconds spin, std::chrono::nanoseconds sleep_limit) {
  constexpr int kPausesBetweenClockReads = 32;
  if (spin.count() > 0) {
    const auto until = std::chrono::steady_clock::now() + spin;
    do {
      for (int i = 0; i < kPausesBetweenClockReads; ++i) {
        if (count.load(std::memory_order_acquire) != seen) {
          return;
        }
        pause_core();
      }
    } while (std::chrono::steady_clock::now() < until);
  }
  sleepers.fetch_add(1, std::memory_order_seq_cst);
  if (count.load(std::memory_order_seq_cst) == seen) {
    const timespec limit = {.tv_sec = static_cast<time_t>(sleep_limit.count() / 1'000'000'000),
                            .tv_nsec = sleep_limit.count() % 1'000'000'000};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&count), FUTEX_WAIT, seen, &limit, nullptr, 0);
  }
  sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace pp_runtime
