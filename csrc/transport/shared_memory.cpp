#include "transport/shared_memory.h"

#include <array>
#include <bit>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace pp_runtime {

namespace {

constexpr uint64_t kMagic = 0x70705f72756e3031ULL;
constexpr uint32_t kRingEntries = 8192;
constexpr uint32_t kMaximumSegments = 128;
constexpr size_t kBlockGranule = 4096;

struct Descriptor {
  uint32_t block;
  uint32_t segment;
  uint64_t offset;
  uint64_t description_bytes;
  uint64_t total_bytes;
};

struct SegmentEntry {
  int64_t fd;
  uint64_t bytes;
};

}  // namespace

/// What both ends of a channel map.
struct ChannelHead {
  uint64_t magic;
  uint32_t credits;
  /// Descriptors in use: a power of two, at least what can be under way, so that few pages are touched.
  uint32_t ring;
  alignas(64) Doorbell messages;
  alignas(64) Doorbell taken;
  alignas(64) Doorbell returns;
  alignas(64) std::array<Descriptor, kRingEntries> descriptors;
  std::array<uint32_t, kRingEntries> returned_blocks;
  std::array<SegmentEntry, kMaximumSegments> segments;
};

SharedSendChannel::SharedSendChannel(uint32_t credits, uint32_t ahead, std::string name, std::shared_ptr<Watch> watch)
    : control_(Segment::create(sizeof(ChannelHead))),
      head_(new (control_->data()) ChannelHead),
      supply_(std::min(std::max(credits, 2U), kRingEntries / 2), kBlockGranule),
      ahead_(std::min(std::max(ahead, 1U), kRingEntries / 2)),
      ring_(std::bit_ceil(ahead_)),
      name_(std::move(name)),
      watch_(std::move(watch)) {
  head_->credits = supply_.credits();
  head_->ring = ring_;
  head_->magic = kMagic;
}

int SharedSendChannel::fd() const { return control_->fd(); }

void SharedSendChannel::connect(Peer receiver, SpinTime spin) {
  peer_ = receiver;
  spin_ = spin;
}

void SharedSendChannel::collect_returns() {
  const uint32_t returned = head_->returns.count.load(std::memory_order_acquire);
  for (; returns_read_ != returned; ++returns_read_) {
    const uint32_t id = head_->returned_blocks[returns_read_ % kRingEntries];
    if (id >= blocks_.size()) {
      throw std::runtime_error("shared memory channel " + name_ + " is corrupted: block " + std::to_string(id) +
                               " came back");
    }
    if (blocks_[id].bytes == supply_.block_bytes()) {
      free_.push_back(id);
    } else {
      drop_pages(id);
    }
  }
}

/// Adds a segment of blocks for messages of `bytes`; false where the channel can have no more.
bool SharedSendChannel::grow(size_t bytes) {
  const BlockSupply::Growth growth = supply_.growth(bytes);
  if (segments_.size() == kMaximumSegments || blocks_.size() + growth.blocks > kRingEntries - 1) {
    return false;
  }
  // Pages that no message touches cost nothing, so all the blocks of a size are one segment.
  segments_.push_back(Segment::create(growth.bytes()));
  const auto index = static_cast<uint32_t>(segments_.size() - 1);
  head_->segments[index] = {.fd = segments_.back()->fd(), .bytes = segments_.back()->bytes()};
  if (growth.outgrows) {
    for (const uint32_t outgrown : std::exchange(free_, {})) {
      drop_pages(outgrown);
    }
  }
  for (uint32_t i = growth.blocks; i > 0; --i) {
    free_.push_back(static_cast<uint32_t>(blocks_.size()));
    blocks_.push_back({.segment = index, .offset = growth.block_bytes * (i - 1), .bytes = growth.block_bytes});
  }
  supply_.grew(growth);
  return true;
}

/// A block of an outgrown size is not used again.
void SharedSendChannel::drop_pages(uint32_t block) {
  segments_[blocks_[block].segment]->drop_pages(blocks_[block].offset, blocks_[block].bytes);
}

void SharedSendChannel::wait_for_takes() {
  uint32_t taken = 0;
  const auto near_enough = [&] {
    taken = head_->taken.count.load(std::memory_order_acquire);
    return sent_ - taken < ahead_;
  };
  wait_for_peers(*watch_, spin_, near_enough,
                 [&](std::chrono::nanoseconds spin) { head_->taken.wait(taken, spin, Watch::kInterval); });
}

uint32_t SharedSendChannel::take_block(size_t bytes) {
  if (bytes > supply_.block_bytes() && !grow(bytes)) {
    throw std::runtime_error("channel " + name_ +
                             " has seen too many sizes of message: keep lengths to fewer, or use the c10d transport");
  }
  const auto since = Watch::Clock::now();
  const auto has_block = [&] {
    collect_returns();
    return !free_.empty() || (Watch::Clock::now() - since > BlockSupply::kPatience && grow(supply_.block_bytes()));
  };
  wait_for_peers(*watch_, spin_, has_block,
                 [&](std::chrono::nanoseconds spin) { head_->returns.wait(returns_read_, spin, Watch::kInterval); });
  const uint32_t id = free_.back();
  free_.pop_back();
  return id;
}

void SharedSendChannel::send(Message message) {
  const MessageSpec spec = MessageSpec::of(message);
  const std::string description = spec.encode();
  const size_t payload_at = align_up(description.size(), kPayloadAlignment);
  const size_t total = payload_at + spec.payload_bytes;
  wait_for_takes();
  const uint32_t id = take_block(total);
  const Block& block = blocks_[id];
  char* bytes = segments_[block.segment]->data() + block.offset;
  std::memcpy(bytes, description.data(), description.size());
  pack(message, spec, bytes + payload_at);
  head_->descriptors[sent_ % ring_] = {.block = id,
                                       .segment = block.segment,
                                       .offset = block.offset,
                                       .description_bytes = description.size(),
                                       .total_bytes = total};
  ++sent_;
  head_->messages.raise();
}

/// Gives blocks back to the sender. Shared by the channel and every tensor that lies in a block, so it outlives the
/// channel where a user keeps one.
class BlockReturns {
 public:
  explicit BlockReturns(std::shared_ptr<Segment> control)
      : control_(std::move(control)), head_(reinterpret_cast<ChannelHead*>(control_->data())) {}

  void borrow() { held_.fetch_add(1, std::memory_order_relaxed); }

  void give_back(uint32_t block) {
    const std::lock_guard lock(mutex_);
    head_->returned_blocks[returned_++ % kRingEntries] = block;
    head_->returns.raise();
    held_.fetch_sub(1, std::memory_order_relaxed);
  }

  uint32_t held() const { return held_.load(std::memory_order_relaxed); }

 private:
  std::shared_ptr<Segment> control_;
  ChannelHead* head_;
  std::mutex mutex_;
  uint32_t returned_ = 0;
  std::atomic<uint32_t> held_{0};
};

namespace {

/// One message's hold on its block: the block goes back with the last tensor that lies in it.
class Lease {
 public:
  Lease(std::shared_ptr<BlockReturns> returns, std::shared_ptr<Segment> segment, uint32_t block)
      : returns_(std::move(returns)), segment_(std::move(segment)), block_(block) {
    returns_->borrow();
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() { returns_->give_back(block_); }

 private:
  std::shared_ptr<BlockReturns> returns_;
  std::shared_ptr<Segment> segment_;
  uint32_t block_;
};

}  // namespace

SharedReceiveChannel::SharedReceiveChannel(Peer sender, int fd, std::string name, std::shared_ptr<Watch> watch,
                                           SpinTime spin)
    : peer_(sender),
      control_(Segment::open(sender.pid, fd, sizeof(ChannelHead))),
      head_(reinterpret_cast<ChannelHead*>(control_->data())),
      returns_(std::make_shared<BlockReturns>(control_)),
      name_(std::move(name)),
      watch_(std::move(watch)),
      spin_(spin) {
  if (head_->magic != kMagic) {
    throw std::runtime_error("the shared memory of channel " + name_ + " was not made by pp_runtime");
  }
  // Read once: what the peer writes there later is not looked at.
  ring_ = head_->ring;
  credits_ = head_->credits;
  if (!std::has_single_bit(ring_) || ring_ > kRingEntries || credits_ > kRingEntries / 2) {
    throw std::runtime_error("shared memory channel " + name_ + " is corrupted: it says " + std::to_string(ring_) +
                             " descriptors and " + std::to_string(credits_) + " credits");
  }
}

char* SharedReceiveChannel::block(uint32_t segment, size_t offset, size_t bytes) {
  if (segment >= kMaximumSegments) {
    throw std::runtime_error("shared memory channel " + name_ + " is corrupted: segment " + std::to_string(segment));
  }
  if (segments_.size() <= segment) {
    segments_.resize(segment + 1);
  }
  if (!segments_[segment]) {
    const SegmentEntry& entry = head_->segments[segment];
    segments_[segment] = Segment::open(peer_.pid, static_cast<int>(entry.fd), entry.bytes);
  }
  if (offset > segments_[segment]->bytes() || bytes > segments_[segment]->bytes() - offset) {
    throw std::runtime_error("shared memory channel " + name_ + " is corrupted: a message lies outside its segment");
  }
  return segments_[segment]->data() + offset;
}

Message SharedReceiveChannel::receive() {
  const auto has_message = [&] { return head_->messages.count.load(std::memory_order_acquire) != taken_; };
  wait_for_peers(*watch_, spin_, has_message,
                 [&](std::chrono::nanoseconds spin) { head_->messages.wait(taken_, spin, Watch::kInterval); });
  const Descriptor descriptor = head_->descriptors[taken_++ % ring_];
  head_->taken.raise();
  char* bytes = block(descriptor.segment, descriptor.offset, descriptor.total_bytes);
  if (descriptor.description_bytes > descriptor.total_bytes) {
    throw std::runtime_error("shared memory channel " + name_ +
                             " is corrupted: a description is longer than its message");
  }
  MessageSpec spec = MessageSpec::decode(bytes, descriptor.description_bytes);
  const size_t payload_at = align_up(descriptor.description_bytes, kPayloadAlignment);
  if (payload_at + spec.payload_bytes > descriptor.total_bytes) {
    throw std::runtime_error("shared memory channel " + name_ + " is corrupted: a message is shorter than its tensors");
  }
  auto lease = std::make_shared<Lease>(returns_, segments_[descriptor.segment], descriptor.block);
  // With the last free block in use the sender would have to wait until somebody lets go of a tensor, so this message
  // is moved out.
  const bool move_out = returns_->held() + 1 >= credits_;
  Message message = spec.take_message();
  message.tensors.reserve(spec.tensors.size());
  for (const TensorSpec& tensor : spec.tensors) {
    if (!tensor.defined) {
      message.tensors.emplace_back();
    } else {
      at::Tensor view = tensor.view(bytes + payload_at, [lease](void*) {}, at::TensorOptions());
      message.tensors.push_back(move_out ? view.clone() : std::move(view));
    }
  }
  return message;
}

}  // namespace pp_runtime
