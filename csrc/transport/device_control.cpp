#include "precompiled.h"

#include "transport/device_control.h"

#include "transport/lane_channel.h"

#include <utility>

namespace pp_runtime {

std::string slot_name(const std::string& channel, uint32_t slot) {
  return "shared slot " + std::to_string(slot) + " of " + channel;
}

SlotReturns::SlotReturns(std::shared_ptr<DeviceControl> control, std::shared_ptr<Lanes> lanes, std::string channel)
    : control_(std::move(control)),
      lanes_(std::move(lanes)),
      channel_(std::move(channel)),
      lane_(lanes_->make("return, " + channel_)) {}

SlotReturns::~SlotReturns() {
  if (!used_.empty() && !drains(*lanes_, used_.back().end)) {
    new std::deque<Used>(std::move(used_));  // the device hangs or failed, and may still read it
    new std::shared_ptr<DeviceControl>(control_);
  }
}

void SlotReturns::give_back(const at::Tensor& area, uint32_t slot, uint32_t use) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    DeviceHead& head = control_->head();
    // Not on the receive lane: a late reader would hold up the next arrival.
    lanes_->mark(lanes_->compute())->hold_back(lane_);
    if (LaneLog* log = lanes_->log()) {
      log->signal(lane_.id(), "freed, " + slot_name(channel_, slot), use);
    }
    control_->device().write(lane_, head.freed[slot], use);
    head.returned[returned_++ % kMostSlots] = slot;
    head.returns.raise();
    while (!used_.empty() && used_.front().end->passed()) {
      used_.pop_front();
    }
    used_.push_back({.area = area, .end = lanes_->mark(lane_)});
  } catch (const std::exception&) {
    // The device is gone, and the step that used the slot with it.
  }
  held_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace pp_runtime
