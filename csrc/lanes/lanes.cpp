#include "lanes/lanes.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#if PP_RUNTIME_CUDA
#include "cuda/streams.h"
#endif

#include <chrono>

namespace pp_runtime {

namespace {

/// torch's generic priorities: lower is more urgent.
constexpr int kUrgent = -1;

c10::Stream current_stream(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

/// With the index that "cuda" alone stands for.
at::Device indexed(at::Device device) {
  return device.has_index() ? device : c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

}  // namespace

Lanes::Lanes(at::Device device) : device_(indexed(device)), compute_(current_stream(device_)) {}

Lanes::Lanes(std::shared_ptr<LaneLog> log)
    : device_(record_device(log)), log_(std::move(log)), compute_(current_stream(device_)) {
  log_->name(compute_.id(), "compute");
}

Lanes::~Lanes() {
#if PP_RUNTIME_CUDA
  for (const c10::Stream& lane : made_) {
    if (lane.device().is_cuda()) {
      cuda::give_back(lane);
    }
  }
#endif
}

c10::Stream Lanes::make(const std::string& name) {
  const auto lane = [this] {
#if PP_RUNTIME_CUDA
    if (device_.is_cuda()) {
      return cuda::take_stream(device_);
    }
#endif
    return c10::impl::VirtualGuardImpl(device_.type()).getNewStream(device_, kUrgent);
  }();
  made_.push_back(lane);
  if (log_) {
    log_->name(lane.id(), name);
  }
  return lane;
}

void Lanes::begin_step() {
  const c10::Stream current = current_stream(device_);
  const std::lock_guard lock(mutex_);
  if (current != compute_) {
    // Slots that the last step's compute lane still reads are given back on the new one.
    Mark(compute_).hold_back(current);
    compute_ = current;
  }
}

c10::Stream Lanes::compute() const {
  const std::lock_guard lock(mutex_);
  return compute_;
}

LaneStopwatch::LaneStopwatch(std::shared_ptr<const Lanes> lanes)
    : lanes_(std::move(lanes)),
      started_(lanes_->device().type(), c10::EventFlag::BACKEND_DEFAULT),
      stopped_(lanes_->device().type(), c10::EventFlag::BACKEND_DEFAULT) {}

void LaneStopwatch::start() { started_.record(lanes_->compute()); }

void LaneStopwatch::stop() { stopped_.record(lanes_->compute()); }

double LaneStopwatch::seconds() const {
  // Some devices have a time only for an event that the host has seen pass.
  started_.synchronize();
  stopped_.synchronize();
  return started_.elapsedTime(stopped_) * 1e-3;
}

LaneClock::LaneClock(std::shared_ptr<const Lanes> lanes) : lanes_(std::move(lanes)) {}

void LaneClock::begin() {
  moments_.clear();
  moment();
  moments_.front().synchronize();
  begun_ns_ =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

size_t LaneClock::moment() {
  // The flag that gives an event a time.
  moments_.emplace_back(lanes_->device().type(), c10::EventFlag::BACKEND_DEFAULT).record(lanes_->compute());
  return moments_.size() - 1;
}

int64_t LaneClock::host_ns(size_t moment) const {
  moments_[moment].synchronize();
  return begun_ns_ + static_cast<int64_t>(moments_.front().elapsedTime(moments_[moment]) * 1e6);
}

}  // namespace pp_runtime
