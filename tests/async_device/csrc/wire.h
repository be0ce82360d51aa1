#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace async_device {

/// A way between two processes of a host for the messages that go in one direction, and answers in the other: a socket.
///
/// The end that listens makes it and tells its address; the other connects. Opened on the host, used on streams.
class Wire {
 public:
  /// The end that listens.
  Wire();
  /// The end that connects, at once: the listener need not have come so far.
  explicit Wire(const std::string& address);
  ~Wire();
  Wire(const Wire&) = delete;
  Wire& operator=(const Wire&) = delete;

  const std::string& address() const { return address_; }
  /// A name for the next message, the same on both ends.
  std::string next_message() { return address_ + "/" + std::to_string(messages_++); }
  /// Accepts the other end's connection if it has come.
  void accept();
  /// The socket; -1 as long as the other end has not connected. `listener` is then what to poll for it.
  int socket() const { return socket_; }
  int listener() const { return listener_; }

 private:
  std::string address_;
  int listener_ = -1;
  int socket_ = -1;
  int64_t messages_ = 0;
};

/// Bytes to write to a wire or to read from it.
struct Transfer {
  std::shared_ptr<Wire> wire;
  bool writes = false;
  char* data = nullptr;
  size_t bytes = 0;
};

/// Something that holds up streams until it is told to let go of them.
class Halt {
 public:
  Halt();
  ~Halt();
  Halt(const Halt&) = delete;
  Halt& operator=(const Halt&) = delete;

  void stop();
  /// To poll: readable from `stop` on.
  int descriptor() const { return descriptor_; }

 private:
  int descriptor_;
};

/// Does all transfers at once; those of one wire and direction one after the other. Where a peer is gone it waits for
/// the halt, as a device does that waits for memory which nobody will write. False when it was stopped.
bool transfer_all(std::vector<Transfer> transfers, const Halt& halt);

}  // namespace async_device
