#pragma once

#include "transport/message.h"

namespace pp_runtime {

/// The sending end of a channel: an ordered, one-directional path to one rank that waits for no other channel.
/// Used by the executor's thread only, without the GIL.
class SendChannel {
 public:
  virtual ~SendChannel() = default;

  /// The rank that receives.
  virtual int peer() const = 0;

  /// Takes the message; its tensors are the channel's until they are read. Waits only where the receiver is further
  /// behind than the channel's credits, and then throws what `Watch::look` throws.
  virtual void send(Message message) = 0;

  /// Called once at the end of a step: returns when nothing of the step is needed from the caller any more.
  virtual void finish_step() = 0;

  /// Called once, after a step failed: lets go of everything on a device that waits for the peer.
  virtual void abandon() noexcept {}
};

/// The receiving end of a channel. Used by the executor's thread only, without the GIL.
class ReceiveChannel {
 public:
  virtual ~ReceiveChannel() = default;

  /// The rank that sends.
  virtual int peer() const = 0;

  /// Says what the coming step will bring, so that receives can be posted before they are asked for.
  virtual void begin_step(size_t messages) = 0;

  /// The next message of the channel; waits for it, and throws what `Watch::look` throws meanwhile.
  virtual Message receive() = 0;

  /// As the sending end's.
  virtual void abandon() noexcept {}
};

}  // namespace pp_runtime
