#include "precompiled.h"

#include "lanes/slots.h"

#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <utility>

namespace pp_runtime {

SlotPool::SlotPool(std::shared_ptr<Lanes> lanes, std::string name, at::Device memory, c10::Stream writer,
                   Readers readers, size_t planned)
    : lanes_(std::move(lanes)),
      name_(std::move(name)),
      memory_(memory),
      writer_(writer),
      readers_(readers),
      planned_(planned) {}

SlotPool::~SlotPool() {
  for (Slot& slot : free_) {
    forget(slot);
  }
}

std::shared_ptr<SlotPool::Lease> SlotPool::take(size_t bytes) {
  const std::lock_guard lock(mutex_);
  const auto fits = [&](const Slot& slot) { return static_cast<size_t>(slot.memory.nbytes()) >= bytes; };
  const auto is_free = [&](const Slot& slot) { return fits(slot) && (!slot.free || slot.free->passed()); };
  auto found = std::find_if(free_.begin(), free_.end(), is_free);
  const bool waits = found == free_.end();
  if (waits && slots_ >= planned_) {
    // The one that was given back first is the first that nobody reads.
    found = std::find_if(free_.begin(), free_.end(), fits);
  }
  if (found == free_.end()) {
    return std::make_shared<Lease>(shared_from_this(), make(bytes));
  }
  Slot slot = std::move(*found);
  free_.erase(found);
  if (waits) {
    slot.free->hold_back(writer_);
  }
  slot.free = nullptr;
  return std::make_shared<Lease>(shared_from_this(), std::move(slot));
}

SlotPool::Slot SlotPool::make(size_t bytes) {
  // Messages have grown: what is too small now is not likely to be asked for again.
  for (auto slot = free_.begin(); slot != free_.end();) {
    if (static_cast<size_t>(slot->memory.nbytes()) < bytes) {
      forget(*slot);
      slot = free_.erase(slot);
      --slots_;
    } else {
      ++slot;
    }
  }
  // The allocator's memory belongs to the stream that is current; the first write is on the writer's.
  const c10::StreamGuard on(writer_);
  ++slots_;
  const std::string name = lanes_->log() == nullptr ? "" : name_ + ", slot " + std::to_string(made_++);
  return {.memory = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions(at::kByte).device(memory_)),
          .name = name,
          .free = nullptr};
}

void SlotPool::give_back(Slot slot) noexcept {
  try {
    if (readers_ == Readers::kCompute) {
      slot.free = lanes_->mark(lanes_->compute());
    }
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(slot));
  } catch (const std::exception&) {
    // The device is gone, and the step that used the slot with it.
    forget(slot);
  }
}

void SlotPool::forget(Slot& slot) noexcept {
  try {
    const c10::Stream compute = lanes_->compute();
    c10::impl::VirtualGuardImpl(compute.device_type()).recordDataPtrOnStream(slot.memory.storage().data_ptr(), compute);
  } catch (const std::exception&) {
    // As above: nothing runs that could still read it.
  }
  slot.memory.reset();
}

}  // namespace pp_runtime
