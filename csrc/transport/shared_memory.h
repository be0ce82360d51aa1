#pragma once

#include "oversight/segment.h"
#include "transport/block_supply.h"
#include "transport/doorbell.h"
#include "transport/peer.h"
#include "transport/transport.h"

#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

struct ChannelHead;

/// The sending end of a channel between two CPU ranks of one host.
///
/// Owns the channel's memory: a ring of message descriptors, a ring of returned blocks, and segments cut into blocks of
/// one size. A message is one copy into a free block and one descriptor. There are `credits` blocks; when none is free
/// the sender waits for the receiver to return one. The credits come from the plan's live intervals, so that is rare;
/// where a wait is longer than BlockSupply::kPatience blocks are added, so no user who keeps tensors can stop the
/// pipeline. It is never more than `ahead` messages ahead of the receiver's takes, so a receiver that frees what it
/// takes at once lets the channel use few blocks, however many it may have.
class SharedSendChannel : public SendChannel {
 public:
  SharedSendChannel(uint32_t credits, uint32_t ahead, std::string name, std::shared_ptr<Watch> watch);
  /// What the receiver needs to open it.
  int fd() const;
  /// Whom the channel leads to; before the first send.
  void connect(Peer receiver, SpinTime spin);

  int peer() const override { return peer_.rank; }
  void send(Message message) override;
  void finish_step() override {}

 private:
  struct Block {
    uint32_t segment;
    size_t offset;
    size_t bytes;
  };

  void wait_for_takes();
  uint32_t take_block(size_t bytes);
  void collect_returns();
  bool grow(size_t bytes);
  void drop_pages(uint32_t block);

  std::shared_ptr<Segment> control_;
  ChannelHead* head_;
  std::vector<std::shared_ptr<Segment>> segments_;
  std::vector<Block> blocks_;
  std::vector<uint32_t> free_;
  BlockSupply supply_;
  uint32_t ahead_;
  uint32_t ring_;
  uint32_t sent_ = 0;
  uint32_t returns_read_ = 0;
  std::string name_;
  std::shared_ptr<Watch> watch_;
  Peer peer_;
  SpinTime spin_;
};

class BlockReturns;

/// The receiving end: its tensors are views of the sender's blocks; a block goes back when the last of them dies, on
/// whatever thread that is.
class SharedReceiveChannel : public ReceiveChannel {
 public:
  SharedReceiveChannel(Peer sender, int fd, std::string name, std::shared_ptr<Watch> watch, SpinTime spin);

  int peer() const override { return peer_.rank; }
  void begin_step(size_t) override {}
  Message receive() override;

 private:
  char* block(uint32_t segment, size_t offset, size_t bytes);

  Peer peer_;
  std::shared_ptr<Segment> control_;
  ChannelHead* head_;
  std::vector<std::shared_ptr<Segment>> segments_;
  std::shared_ptr<BlockReturns> returns_;
  uint32_t ring_;
  uint32_t credits_;
  uint32_t taken_ = 0;
  std::string name_;
  std::shared_ptr<Watch> watch_;
  SpinTime spin_;
};

}  // namespace pp_runtime
