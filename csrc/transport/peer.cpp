#include "transport/peer.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string>

namespace pp_runtime {

int open_process(int64_t pid) { return static_cast<int>(syscall(SYS_pidfd_open, pid, 0)); }

bool has_ended(int handle) {
  pollfd ended = {.fd = handle, .events = POLLIN, .revents = 0};
  return handle >= 0 && poll(&ended, 1, 0) > 0;
}

void throw_lost(const Peer& peer) {
  throw PeerLost(peer.rank,
                 "the process of rank " + std::to_string(peer.rank) + " (pid " + std::to_string(peer.pid) + ") ended");
}

}  // namespace pp_runtime
