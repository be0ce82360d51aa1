#include "lanes/lane_log.h"

#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <utility>

namespace pp_runtime {

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kIndex = 0;

struct RecordedEvent {
  uint64_t number = 0;
  /// The host knows that it has passed.
  bool known = false;
  std::chrono::steady_clock::time_point when;
};

thread_local int64_t current_lane = 0;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

/// A device as slow as it can be: an event has passed only for a host that stands still and asks for it.
class RecordedDevice : public c10::impl::DeviceGuardImplInterface {
 public:
  void write_into(std::shared_ptr<LaneLog> log) {
    const std::lock_guard lock(mutex_);
    log_ = std::move(log);
  }

  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return {kType, kIndex}; }
  c10::Device getDevice() const override { return {kType, kIndex}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  // torch's autograd engine makes a thread a device, and needs none here.
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }

  c10::Stream getStream(c10::Device) const override { return lane(current_lane); }
  c10::Stream getDefaultStream(c10::Device) const override { return lane(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return lane(++lanes_); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return lane(std::exchange(current_lane, stream.id()));
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new RecordedEvent;
    }
    auto* recorded = static_cast<RecordedEvent*>(*event);
    recorded->number = ++events_;
    recorded->known = false;
    recorded->when = std::chrono::steady_clock::now();
    log()->mark(stream.id(), recorded->number);
  }
  void block(void* event, const c10::Stream& stream) const override { log()->wait(stream.id(), number_of(event)); }
  bool queryEvent(void* event) const override {
    auto* recorded = static_cast<RecordedEvent*>(event);
    if (recorded->known) {
      return true;
    }
    const size_t size = log()->size();
    const bool stands_still = asked_.exchange(recorded->number) == recorded->number && asked_at_.exchange(size) == size;
    asked_at_ = size;
    if (stands_still) {
      synchronizeEvent(event);
    }
    return stands_still;
  }
  void synchronizeEvent(void* event) const override {
    auto* recorded = static_cast<RecordedEvent*>(event);
    if (!std::exchange(recorded->known, true)) {
      log()->passed(recorded->number);
    }
  }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(static_cast<RecordedEvent*>(to)->when -
                                                     static_cast<RecordedEvent*>(from)->when)
        .count();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<RecordedEvent*>(event);
  }

 private:
  static c10::Stream lane(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, {kType, kIndex}, id); }
  static uint64_t number_of(void* event) { return static_cast<RecordedEvent*>(event)->number; }
  std::shared_ptr<LaneLog> log() const {
    const std::lock_guard lock(mutex_);
    return log_;
  }

  mutable std::mutex mutex_;
  std::shared_ptr<LaneLog> log_;
  mutable std::atomic<int64_t> lanes_{0};
  mutable std::atomic<uint64_t> events_{0};
  /// The event that the host asked for last, and how much was written down then.
  mutable std::atomic<uint64_t> asked_{0};
  mutable std::atomic<size_t> asked_at_{0};
};

}  // namespace

void LaneLog::name(int64_t lane, std::string text) {
  const std::lock_guard lock(mutex_);
  names_.emplace_back(lane, std::move(text));
}

void LaneLog::work(int64_t lane, std::string text, std::vector<std::string> reads, std::vector<std::string> writes) {
  const std::lock_guard lock(mutex_);
  records_.push_back({LaneRecord::Kind::kWork, lane, 0, std::move(text), std::move(reads), std::move(writes), now()});
}

void LaneLog::mark(int64_t lane, uint64_t event) {
  const std::lock_guard lock(mutex_);
  records_.push_back({LaneRecord::Kind::kMark, lane, event, {}, {}, {}, now()});
}

void LaneLog::wait(int64_t lane, uint64_t event) {
  const std::lock_guard lock(mutex_);
  if (waits_++ != omitted_wait_) {
    records_.push_back({LaneRecord::Kind::kWait, lane, event, {}, {}, {}, now()});
  }
}

void LaneLog::passed(uint64_t event) {
  const std::lock_guard lock(mutex_);
  records_.push_back({LaneRecord::Kind::kPassed, 0, event, {}, {}, {}, now()});
}

void LaneLog::signal(int64_t lane, std::string number, uint64_t value) {
  const std::lock_guard lock(mutex_);
  records_.push_back({LaneRecord::Kind::kSignal, lane, value, std::move(number), {}, {}, now()});
}

void LaneLog::await(int64_t lane, std::string number, uint64_t value) {
  const std::lock_guard lock(mutex_);
  if (waits_++ != omitted_wait_) {
    records_.push_back({LaneRecord::Kind::kAwait, lane, value, std::move(number), {}, {}, now()});
  }
}

std::vector<LaneRecord> LaneLog::records() const {
  const std::lock_guard lock(mutex_);
  return records_;
}

std::vector<std::pair<int64_t, std::string>> LaneLog::names() const {
  const std::lock_guard lock(mutex_);
  return names_;
}

size_t LaneLog::size() const {
  const std::lock_guard lock(mutex_);
  return records_.size();
}

at::Device record_device(std::shared_ptr<LaneLog> log) {
  // torch keeps a pointer to it for the life of the process.
  static auto* device = new RecordedDevice;
  auto& registered = c10::impl::device_guard_impl_registry[static_cast<size_t>(kType)];
  const auto* found = registered.load();
  if (found != nullptr && found != device) {
    throw std::runtime_error("lanes are recorded under torch's PrivateUse1, which this process uses for a device");
  }
  device->write_into(std::move(log));
  registered.store(device);
  return {kType, kIndex};
}

}  // namespace pp_runtime
