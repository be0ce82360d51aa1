#pragma once

#include "watch.h"

#include <chrono>
#include <cstdint>

namespace pp_runtime {

/// A rank on this host, as the exchange at the opening found it.
struct Peer {
  int rank = -1;
  int64_t pid = 0;
};

/// How long a wait spins before it sleeps; zero where there are more ranks than cores.
struct SpinTime {
  std::chrono::nanoseconds value{0};
};

/// A handle by which a process's end is seen, also one that nobody has reaped; -1 where the kernel gives none.
int open_process(int64_t pid);
bool has_ended(int handle);
[[noreturn]] void throw_lost(const Peer& peer);

/// Calls `sleep(spin)` until `done()`. Between sleeps it looks at the watch, and whether the peer lives.
/// `done` is asked after the peer was: one that did its part and ended is no loss.
template <typename Done, typename Sleep>
void wait_for_peer(const Peer& peer, int handle, Watch& watch, SpinTime spin, const Done& done, const Sleep& sleep) {
  if (done()) {
    return;
  }
  const auto since = Watch::Clock::now();
  sleep(spin.value);
  while (!done()) {
    watch.look(since);
    if (has_ended(handle) && !done()) {
      throw_lost(peer);
    }
    sleep(std::chrono::nanoseconds(0));
  }
}

}  // namespace pp_runtime
