#pragma once

#include "lanes/lanes.h"

#include <ATen/core/Tensor.h>

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace pp_runtime {

/// The device memory that a channel's messages lie in.
///
/// A slot is written on the channel's lane and read on the compute lane. When the last tensor that lies in it dies, on
/// whatever thread, the slot is given back with a mark on the compute lane, and its next writer waits for that mark on
/// the device: nobody waits on the host. There are as many slots as the plan has messages alive at once, and more only
/// where a user keeps tensors for longer.
class SlotPool : public std::enable_shared_from_this<SlotPool> {
 public:
  class Lease;

  enum class Readers : uint8_t {
    /// Readers are queued on the compute lane when a slot is given back.
    kCompute,
    /// The host has seen them end.
    kNone
  };

  SlotPool(std::shared_ptr<Lanes> lanes, std::string name, at::Device memory, c10::Stream writer, Readers readers,
           size_t planned);
  ~SlotPool();
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  /// A slot that the writer may fill from now on.
  std::shared_ptr<Lease> take(size_t bytes);

 private:
  struct Slot {
    at::Tensor memory;
    std::string name;
    /// After this nobody reads it.
    MarkPointer free;
  };

  Slot make(size_t bytes);
  void give_back(Slot slot) noexcept;
  void forget(Slot& slot) noexcept;

  std::shared_ptr<Lanes> lanes_;
  std::string name_;
  at::Device memory_;
  c10::Stream writer_;
  Readers readers_;
  size_t planned_;
  std::mutex mutex_;
  std::deque<Slot> free_;
  size_t slots_ = 0;
  size_t made_ = 0;
};

/// A hold on a slot; dropping it gives the slot back.
class SlotPool::Lease {
 public:
  Lease(std::shared_ptr<SlotPool> pool, Slot slot) : pool_(std::move(pool)), slot_(std::move(slot)) {}
  ~Lease() { pool_->give_back(std::move(slot_)); }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  const at::Tensor& memory() const { return slot_.memory; }
  const std::string& name() const { return slot_.name; }

 private:
  std::shared_ptr<SlotPool> pool_;
  Slot slot_;
};

}  // namespace pp_runtime
