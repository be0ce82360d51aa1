#pragma once

#include "lanes/slots.h"
#include "transport/lane_channel.h"
#include "transport/wait_guard.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <memory>
#include <string>

namespace pp_runtime {

/// Where a channel's tensors go: its own communicator, and how many slots the plan gives it.
struct CommunicatorPath {
  std::shared_ptr<Lanes> lanes;
  std::string name;
  at::Device memory = at::kCPU;
  c10::intrusive_ptr<c10d::Backend> communicator;
  /// The peer's rank in the communicator.
  int peer = -1;
  int tag = 0;
  size_t slots = 2;
  /// The communicator was made for channels, so it may be aborted with them.
  bool owned = false;
};

/// Tensors of a device that a communicator (NCCL's, or another's) carries: copied into a slot, sent on the lane.
class CommunicatorSendChannel final : public LaneSendChannel {
 public:
  CommunicatorSendChannel(std::shared_ptr<SendChannel> host, CommunicatorPath path, std::shared_ptr<Watch> watch,
                          std::shared_ptr<WaitGuard> guard);
  ~CommunicatorSendChannel() override;

 protected:
  std::string carry(const Message& message, const MessageSpec& spec, OnItsWay& on_its_way) override;
  void ended(OnItsWay& message) override;

 private:
  struct Sent;

  CommunicatorPath path_;
  std::shared_ptr<WaitGuard> guard_;
  std::shared_ptr<SlotPool> slots_;
};

/// The receiving end. A receive waits for the last reader of its slot and for nothing else.
class CommunicatorReceiveChannel final : public LaneReceiveChannel {
 public:
  CommunicatorReceiveChannel(std::shared_ptr<ReceiveChannel> host, CommunicatorPath path, std::shared_ptr<Watch> watch,
                             std::shared_ptr<WaitGuard> guard);
  ~CommunicatorReceiveChannel() override;

 protected:
  Arrived arrive(const MessageSpec& spec, const std::string& told) override;

 private:
  CommunicatorPath path_;
  std::shared_ptr<WaitGuard> guard_;
  std::shared_ptr<SlotPool> slots_;
};

}  // namespace pp_runtime
