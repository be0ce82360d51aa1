#pragma once

#include "oversight/watch.h"

#include <chrono>
#include <cstdint>
#include <optional>

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

/// Calls `sleep(spin)` until `done()`. Between sleeps it looks at the watch, and whether the ranks of this host live:
/// also one that this rank does not wait for, since somebody does.
/// `done` is asked after the processes were: one that did its part and ended is no loss.
/// The watch is told how long it took; a wait that is over before it begins asks no clock.
template <typename Done, typename Sleep>
void wait_for_peers(Watch& watch, SpinTime spin, const Done& done, const Sleep& sleep) {
  if (done()) {
    return;
  }
  const auto since = Watch::Clock::now();
  sleep(spin.value);
  while (!done()) {
    const std::optional<int> ended = watch.ended();
    try {
      watch.look(since);
    } catch (const StoreLost&) {
      // The process that keeps the store may be the rank that ended.
      if (!ended) {
        throw;
      }
    }
    if (ended && !done()) {
      watch.throw_lost(*ended);
    }
    sleep(std::chrono::nanoseconds(0));
  }
  watch.add_wait(Watch::Clock::now() - since);
}

}  // namespace pp_runtime
