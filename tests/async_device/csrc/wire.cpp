#include "wire.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <utility>

namespace async_device {

namespace {

int checked(int result, const char* what) {
  if (result < 0) {
    throw std::system_error(errno, std::generic_category(), std::string("the asynchronous device's wire: ") + what);
  }
  return result;
}

/// A name that is no file, so that nothing is left behind.
std::pair<sockaddr_un, socklen_t> named(const std::string& name) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

/// As many bytes as can be moved now; false where the peer is gone.
bool move_some(Transfer& transfer, int socket) {
  while (transfer.bytes > 0) {
    const ssize_t moved = transfer.writes ? send(socket, transfer.data, transfer.bytes, MSG_NOSIGNAL | MSG_DONTWAIT)
                                          : recv(socket, transfer.data, transfer.bytes, MSG_DONTWAIT);
    if (moved < 0 && errno == EINTR) {
      continue;
    }
    if (moved < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      return true;
    }
    if (moved <= 0) {
      return false;
    }
    transfer.data += moved;
    transfer.bytes -= static_cast<size_t>(moved);
  }
  return true;
}

}  // namespace

Wire::Wire() {
  static std::atomic<uint64_t> number{0};
  address_ = "pp_runtime-async_device-" + std::to_string(getpid()) + "-" + std::to_string(number++);
  listener_ = checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), "socket");
  const auto [address, length] = named(address_);
  checked(bind(listener_, reinterpret_cast<const sockaddr*>(&address), length), "bind");
  checked(listen(listener_, 1), "listen");
}

Wire::Wire(const std::string& address) : address_(address) {
  socket_ = checked(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), "socket");
  const auto [to, length] = named(address_);
  checked(connect(socket_, reinterpret_cast<const sockaddr*>(&to), length), "connect");
}

Wire::~Wire() {
  for (const int descriptor : {listener_, socket_}) {
    if (descriptor >= 0) {
      close(descriptor);
    }
  }
}

void Wire::accept() {
  if (socket_ < 0) {
    socket_ = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
  }
}

Halt::Halt() : descriptor_(checked(eventfd(0, EFD_CLOEXEC), "eventfd")) {}

Halt::~Halt() { close(descriptor_); }

void Halt::stop() {
  const uint64_t one = 1;
  [[maybe_unused]] const auto written = write(descriptor_, &one, sizeof one);
}

bool transfer_all(std::vector<Transfer> transfers, const Halt& halt) {
  bool peer_is_gone = false;
  for (;;) {
    std::vector<pollfd> polled = {{halt.descriptor(), POLLIN, 0}};
    std::vector<std::pair<const Wire*, bool>> seen;
    bool all_done = true;
    // First, so that none of them polls for a connection that another has accepted.
    for (const Transfer& transfer : transfers) {
      transfer.wire->accept();
    }
    for (Transfer& transfer : transfers) {
      const std::pair<const Wire*, bool> lane{transfer.wire.get(), transfer.writes};
      if (transfer.bytes == 0 || std::find(seen.begin(), seen.end(), lane) != seen.end()) {
        continue;
      }
      const int socket = transfer.wire->socket();
      if (socket >= 0 && !move_some(transfer, socket)) {
        peer_is_gone = true;
      }
      if (transfer.bytes > 0) {
        all_done = false;
        seen.push_back(lane);
        polled.push_back({socket >= 0 ? socket : transfer.wire->listener(),
                          static_cast<int16_t>(socket >= 0 && transfer.writes ? POLLOUT : POLLIN), 0});
      }
    }
    if (all_done) {
      return true;
    }
    if (peer_is_gone) {
      polled.resize(1);
    }
    if (poll(polled.data(), polled.size(), -1) > 0 && polled[0].revents != 0) {
      return false;
    }
  }
}

}  // namespace async_device
