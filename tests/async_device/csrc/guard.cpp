// What c10 asks of a device: its streams and its events.

#include "allocator.h"
#include "device.h"
#include "log.h"
#include "settings.h"
#include "streams.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <chrono>

namespace async_device {

namespace {

/// What c10::Event points to. It can be recorded anew; what waits for an earlier recording keeps that one.
struct Event {
  MomentPointer moment;
};

Event* of(void* event) { return static_cast<Event*>(event); }

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const override { return as_c10(current()); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_c10(stream(0)); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return as_c10(make_stream()); }
  c10::Stream getNewStream(c10::Device, int) const override { return as_c10(make_stream()); }
  c10::Stream exchangeStream(c10::Stream to) const override { return as_c10(stream(make_current(to.id()))); }
  bool queryStream(const c10::Stream& on) const override { return stream(on.id()).is_idle(); }
  void synchronizeStream(const c10::Stream& on) const override { synchronize(*stream(on.id()).mark()); }
  void synchronizeDevice(c10::DeviceIndex) const override { synchronize_device(); }

  void record(void** event, const c10::Stream& on, c10::DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Event;
    }
    of(*event)->moment = stream(on.id()).mark();
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event != nullptr && !log().leaves_out(on.id(), *of(event)->moment)) {
      stream(on.id()).wait_for(of(event)->moment);
    }
  }
  bool queryEvent(void* event) const override { return event == nullptr || host_sees(*of(event)->moment); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      synchronize(*of(event)->moment);
    }
  }
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    const auto passed = of(to)->moment->when() - of(from)->moment->when();
    return std::chrono::duration<double, std::milli>(passed).count();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete of(event); }

  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& on) const override {
    record_on(data.get(), on.id());
  }
};

}  // namespace

void register_guard() { c10::impl::device_guard_impl_registry[static_cast<size_t>(kType)].store(new Guard); }

}  // namespace async_device
