#pragma once

#include "lanes/lanes.h"
#include "oversight/peer_memory.h"
#include "oversight/segment.h"
#include "transport/doorbell.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

namespace pp_runtime {

constexpr uint64_t kDeviceMagic = 0x70705f6465766d31ULL;
constexpr uint32_t kMostSlots = 1024;

/// What both ends map: the numbers that streams write and wait for, and the hosts' ring of returned slots.
struct DeviceHead {
  uint64_t magic = 0;
  /// How many slots the receiver's user keeps from earlier steps.
  alignas(64) std::atomic<uint32_t> kept{0};
  alignas(64) Doorbell returns;
  std::array<uint32_t, kMostSlots> returned{};
  alignas(64) std::array<std::atomic<uint32_t>, kMostSlots> arrived{};
  alignas(64) std::array<std::atomic<uint32_t>, kMostSlots> freed{};
};

/// The control memory as this process's device knows it.
class DeviceControl {
 public:
  DeviceControl(std::shared_ptr<Segment> segment, std::shared_ptr<PeerMemory> device)
      : segment_(std::move(segment)), device_(std::move(device)) {
    device_->adopt(segment_->data(), segment_->bytes());
  }
  DeviceControl(const DeviceControl&) = delete;
  DeviceControl& operator=(const DeviceControl&) = delete;
  ~DeviceControl() { device_->forget(segment_->data()); }

  DeviceHead& head() const { return *reinterpret_cast<DeviceHead*>(segment_->data()); }
  PeerMemory& device() const { return *device_; }
  Segment& segment() const { return *segment_; }

 private:
  std::shared_ptr<Segment> segment_;
  std::shared_ptr<PeerMemory> device_;
};

/// What a slot is called on both ranks, in the log of their lanes.
std::string slot_name(const std::string& channel, uint32_t slot);

/// Gives slots back to the sender. Shared by the channel and every tensor that lies in a slot, so it outlives the
/// channel where a user keeps one. Any thread.
class SlotReturns {
 public:
  SlotReturns(std::shared_ptr<DeviceControl> control, std::shared_ptr<Lanes> lanes, std::string channel);
  ~SlotReturns();
  SlotReturns(const SlotReturns&) = delete;
  SlotReturns& operator=(const SlotReturns&) = delete;

  void borrow() { held_.fetch_add(1, std::memory_order_relaxed); }
  void give_back(const at::Tensor& area, uint32_t slot, uint32_t use) noexcept;
  uint32_t held() const { return held_.load(std::memory_order_relaxed); }

 private:
  /// Memory that the device may still read, though the host is done with it.
  struct Used {
    at::Tensor area;
    MarkPointer end;
  };

  std::shared_ptr<DeviceControl> control_;
  std::shared_ptr<Lanes> lanes_;
  std::string channel_;
  c10::Stream lane_;
  std::mutex mutex_;
  uint32_t returned_ = 0;
  std::deque<Used> used_;
  std::atomic<uint32_t> held_{0};
};

}  // namespace pp_runtime
