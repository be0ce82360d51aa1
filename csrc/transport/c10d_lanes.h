#pragma once

#include "lanes/lanes.h"
#include "lanes/slots.h"
#include "transport/c10d.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <deque>
#include <memory>
#include <vector>

namespace pp_runtime {

/// Where a channel's tensors go on an accelerator: its own communicator, and how many slots the plan gives it.
struct LanePath {
  std::shared_ptr<Lanes> lanes;
  c10::intrusive_ptr<c10d::Backend> communicator;
  /// The peer's rank in the communicator.
  int peer = -1;
  size_t slots = 2;
  /// The communicator was made for channels, so it may be aborted with them.
  bool owned = false;
};

/// The sending end of a channel whose tensors lie on an accelerator.
///
/// What describes a message still goes from host to host; the tensors are copied into a slot and sent on the channel's
/// own lane, which waits for their producer and for nothing else. The tensors are held until the host sees that the
/// device has sent them, or the step ends; the host waits for that only where it is `slots` messages ahead.
class LaneSendChannel : public C10dSendChannel {
 public:
  LaneSendChannel(C10dPath path, LanePath on_device, std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard);
  ~LaneSendChannel() override;

  /// The host does not wait for the device. What the user does next with the step's tensors waits for their copies.
  void finish_step() override;

 protected:
  bool carries_inside() const override { return false; }
  void send_payload(Message message, const MessageSpec& spec) override;

 private:
  struct OnItsWay {
    c10::intrusive_ptr<c10d::Work> work;
    std::vector<at::Tensor> tensors;
    std::shared_ptr<SlotPool::Lease> slot;
    MarkPointer copied;
    MarkPointer sent;
    std::string buffer;
  };

  void drop_tensors(OnItsWay& message);
  void drop_sent(size_t most);
  void drop_oldest();

  LanePath on_device_;
  c10::Stream lane_;
  std::shared_ptr<SlotPool> slots_;
  std::deque<OnItsWay> on_their_way_;
};

/// The receiving end. A receive is queued on the channel's own lane as soon as the host knows its size; it waits for
/// the last reader of its slot and for nothing else. The host does not wait for it.
class LaneReceiveChannel : public C10dReceiveChannel {
 public:
  LaneReceiveChannel(C10dPath path, LanePath on_device, std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard);
  ~LaneReceiveChannel() override;

 protected:
  void receive_payload(Message& message, const MessageSpec& spec) override;

 private:
  LanePath on_device_;
  c10::Stream lane_;
  std::shared_ptr<SlotPool> slots_;
  MarkPointer last_arrival_;
};

}  // namespace pp_runtime
