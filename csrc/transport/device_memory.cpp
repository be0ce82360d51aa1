#include "precompiled.h"

#include "transport/device_memory.h"

#include "transport/device_control.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <utility>

namespace pp_runtime {

namespace {

constexpr size_t kSlotAlignment = 512;

/// Where a message's tensors are, beside its description.
struct Told {
  uint32_t slot;
  uint32_t use;
  uint32_t area;
  /// Areas below this are outgrown.
  uint32_t oldest_area;
  int64_t fd;
  uint64_t area_bytes;
  uint64_t offset;
};

}  // namespace

struct DeviceSendChannel::Area {
  PeerMemory::Mapping mapping;
  uint32_t number;
  uint64_t bytes;
};

std::shared_ptr<Segment> DeviceSendChannel::make_control() {
  auto segment = Segment::create(sizeof(DeviceHead));
  new (segment->data()) DeviceHead;
  reinterpret_cast<DeviceHead*>(segment->data())->magic = kDeviceMagic;
  return segment;
}

DeviceSendChannel::DeviceSendChannel(std::shared_ptr<SendChannel> host, DevicePath path,
                                     std::shared_ptr<Segment> control, std::string receiver_device, uint32_t credits,
                                     std::shared_ptr<Watch> watch, SpinTime spin)
    : LaneSendChannel(std::move(host), path.lanes, path.name, std::max(credits, 2U), std::move(watch)),
      control_(std::make_shared<DeviceControl>(std::move(control), std::move(path.peer_memory))),
      receiver_device_(std::move(receiver_device)),
      supply_(std::clamp(credits, 2U, kMostSlots / 4), kSlotAlignment),
      spin_(spin) {}

DeviceSendChannel::~DeviceSendChannel() {
  std::deque<OnItsWay> left = take_on_their_way();
  if (left.empty() || comes_to(lanes(), left.back().done, watch())) {
    return;
  }
  abandon();
  if (!drains(lanes(), left.back().done)) {
    // The device hangs or failed. What it may still read and write stays for as long as the process lives.
    new std::deque<OnItsWay>(std::move(left));
    new std::vector<Slot>(std::move(slots_));
    new std::shared_ptr<DeviceControl>(control_);
  }
}

void DeviceSendChannel::abandon() noexcept {
  for (uint32_t slot = 0; slot < slots_.size(); ++slot) {
    control_->head().freed[slot].store(slots_[slot].uses, std::memory_order_release);
  }
}

void DeviceSendChannel::retire(uint32_t slot) {
  slots_[slot].area.reset();
  unused_.push_back(slot);
}

void DeviceSendChannel::collect_returns() {
  const DeviceHead& head = control_->head();
  const uint32_t returned = head.returns.count.load(std::memory_order_acquire);
  for (; returns_read_ != returned; ++returns_read_) {
    const uint32_t slot = head.returned[returns_read_ % kMostSlots];
    if (slot >= slots_.size() || !slots_[slot].area) {
      throw std::runtime_error("channel " + name() + " is corrupted: slot " + std::to_string(slot) + " came back");
    }
    if (slots_[slot].area->number >= oldest_area_) {
      free_.push_back(slot);
    } else {
      retire(slot);
    }
  }
}

/// Adds slots for messages of `bytes`; false where the channel can have no more.
bool DeviceSendChannel::grow(size_t bytes) {
  const BlockSupply::Growth growth = supply_.growth(bytes);
  if (slots_.size() + growth.blocks > kMostSlots + unused_.size()) {
    return false;
  }
  const auto area = std::make_shared<Area>();
  area->bytes = growth.bytes();
  area->mapping = control_->device().allocate(receiver_device_, area->bytes);
  area->number = areas_made_++;
  if (growth.outgrows) {
    oldest_area_ = area->number;
    for (const uint32_t outgrown : std::exchange(free_, {})) {
      retire(outgrown);
    }
  }
  for (uint32_t i = 0; i < growth.blocks; ++i) {
    if (unused_.empty()) {
      unused_.push_back(static_cast<uint32_t>(slots_.size()));
      slots_.emplace_back();
    }
    const uint32_t slot = unused_.back();
    unused_.pop_back();
    slots_[slot].area = area;
    slots_[slot].offset = growth.block_bytes * i;
    free_.push_back(slot);
  }
  supply_.grew(growth);
  return true;
}

uint32_t DeviceSendChannel::take_slot(size_t bytes) {
  if (bytes > supply_.block_bytes() && !grow(bytes)) {
    throw std::runtime_error("channel " + name() +
                             " has seen too many sizes of message: keep lengths to fewer, or set "
                             "PP_RUNTIME_TRANSPORT=c10d");
  }
  const auto since = Watch::Clock::now();
  const auto has_slot = [&] {
    collect_returns();
    if (!free_.empty()) {
      return true;
    }
    // What a user keeps from earlier steps does not come back in this one.
    const bool kept = supply_.blocks() < supply_.credits() + control_->head().kept.load(std::memory_order_relaxed);
    return (kept || Watch::Clock::now() - since > BlockSupply::kPatience) && grow(supply_.block_bytes());
  };
  wait_for_peers(watch(), spin_, has_slot, [&](std::chrono::nanoseconds spin) {
    control_->head().returns.wait(returns_read_, spin, Watch::kInterval);
  });
  const uint32_t slot = free_.back();
  free_.pop_back();
  return slot;
}

std::string DeviceSendChannel::carry(const Message& message, const MessageSpec& spec, OnItsWay& on_its_way) {
  const uint32_t number = take_slot(spec.payload_bytes);
  Slot& slot = slots_[number];
  const Area& area = *slot.area;
  DeviceHead& head = control_->head();
  if (slot.uses > 0) {
    control_->device().wait(lane(), head.freed[number], slot.uses);
    if (LaneLog* log = lanes().log()) {
      log->await(lane().id(), "freed, " + slot_name(name(), number), slot.uses);
    }
  }
  const at::Tensor place =
      area.mapping.bytes.narrow(0, static_cast<int64_t>(slot.offset), static_cast<int64_t>(spec.payload_bytes));
  copy_into(place, message, spec);
  ++slot.uses;
  if (LaneLog* log = lanes().log()) {
    log->work(lane().id(), "copy for " + name(), {message.lane->buffer}, {slot_name(name(), number)});
    log->signal(lane().id(), "arrived, " + slot_name(name(), number), slot.uses);
  }
  control_->device().write(lane(), head.arrived[number], slot.uses);
  on_its_way.kept = slot.area;
  const Told told = {.slot = number,
                     .use = slot.uses,
                     .area = area.number,
                     .oldest_area = oldest_area_,
                     .fd = area.mapping.fd,
                     .area_bytes = area.bytes,
                     .offset = slot.offset};
  return {reinterpret_cast<const char*>(&told), sizeof(told)};
}

namespace {

/// One message's hold on its slot.
class SlotLease {
 public:
  SlotLease(std::shared_ptr<SlotReturns> returns, at::Tensor area, uint32_t slot, uint32_t use)
      : returns_(std::move(returns)), area_(std::move(area)), slot_(slot), use_(use) {
    returns_->borrow();
  }
  SlotLease(const SlotLease&) = delete;
  SlotLease& operator=(const SlotLease&) = delete;
  ~SlotLease() { returns_->give_back(area_, slot_, use_); }

 private:
  std::shared_ptr<SlotReturns> returns_;
  at::Tensor area_;
  uint32_t slot_;
  uint32_t use_;
};

}  // namespace

DeviceReceiveChannel::DeviceReceiveChannel(std::shared_ptr<ReceiveChannel> host, DevicePath path, Peer sender,
                                           int control_fd, std::shared_ptr<Watch> watch)
    : LaneReceiveChannel(std::move(host), path.lanes, path.name, path.memory, std::move(watch)),
      sender_(sender),
      control_(std::make_shared<DeviceControl>(Segment::open(sender.pid, control_fd, sizeof(DeviceHead)),
                                               std::move(path.peer_memory))),
      returns_(std::make_shared<SlotReturns>(control_, shared_lanes(), name())),
      awaited_(kMostSlots) {
  if (control_->head().magic != kDeviceMagic) {
    throw std::runtime_error("the control memory of channel " + name() + " was not made by pp_runtime");
  }
}

DeviceReceiveChannel::~DeviceReceiveChannel() {
  if (last_arrival() && !comes_to(lanes(), last_arrival(), watch())) {
    abandon();
    if (!drains(lanes(), last_arrival())) {
      // As at the sending end.
      new std::map<uint32_t, at::Tensor>(std::move(areas_));
      new std::shared_ptr<DeviceControl>(control_);
    }
  }
}

void DeviceReceiveChannel::begin_step(size_t messages) {
  control_->head().kept.store(returns_->held(), std::memory_order_relaxed);
  LaneReceiveChannel::begin_step(messages);
}

void DeviceReceiveChannel::abandon() noexcept {
  for (uint32_t slot = 0; slot < kMostSlots; ++slot) {
    if (awaited_[slot] > 0) {
      control_->head().arrived[slot].store(awaited_[slot], std::memory_order_release);
    }
  }
}

LaneReceiveChannel::Arrived DeviceReceiveChannel::arrive(const MessageSpec& spec, const std::string& bytes) {
  Told told{};
  if (bytes.size() == sizeof(told)) {
    std::memcpy(&told, bytes.data(), sizeof(told));
  }
  if (bytes.size() != sizeof(told) || told.slot >= kMostSlots || told.offset > told.area_bytes ||
      spec.payload_bytes > told.area_bytes - told.offset) {
    throw std::runtime_error("channel " + name() + " is corrupted: a message lies outside its memory");
  }
  areas_.erase(areas_.begin(), areas_.lower_bound(told.oldest_area));
  auto area = areas_.find(told.area);
  if (area == areas_.end()) {
    const PeerMemory::Handle handle = {
        .pid = sender_.pid, .fd = static_cast<int32_t>(told.fd), .bytes = told.area_bytes};
    area = areas_.emplace(told.area, control_->device().open(handle)).first;
  }
  awaited_[told.slot] = told.use;
  control_->device().wait(lane(), control_->head().arrived[told.slot], told.use);
  std::string buffer;
  if (LaneLog* log = lanes().log()) {
    buffer = slot_name(name(), told.slot);
    log->await(lane().id(), "arrived, " + buffer, told.use);
  }
  auto lease = std::make_shared<SlotLease>(returns_, area->second, told.slot, told.use);
  const std::weak_ptr<void> alive = lease;
  return {
      .tensors = unpack(area->second, told.offset, spec, std::move(lease)), .buffer = std::move(buffer), .slot = alive};
}

}  // namespace pp_runtime
