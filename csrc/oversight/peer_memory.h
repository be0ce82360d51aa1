#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace pp_runtime {

/// Device memory that several processes of one host map, and numbers in host memory that their streams write and wait
/// for: all that a channel between two devices of a host needs of them. One implementation a kind of device: CUDA's is
/// in cuda/, others are registered (pp_runtime.running.register_peer_memory).
///
/// Any thread, without the GIL. All members are virtual, so that a module of its own can implement it.
class PeerMemory {
 public:
  /// Memory that another process made, as it told of it.
  struct Handle {
    int64_t pid = 0;
    int32_t fd = -1;
    uint64_t bytes = 0;
  };

  /// A mapping. It is undone when the last tensor that lies in it dies.
  struct Mapping {
    at::Tensor bytes;
    /// What a peer opens it by; open as long as the mapping.
    int32_t fd = -1;
  };

  virtual ~PeerMemory() = default;

  /// Names this process's device among all devices of the host.
  virtual std::string name() const = 0;

  /// Memory of the device with that name, mapped for this process's device. Throws std::runtime_error where that device
  /// cannot be reached from here, or has no memory left.
  virtual Mapping allocate(const std::string& device, size_t bytes) = 0;

  /// Maps memory that a peer allocated on this process's device. Throws std::runtime_error where it cannot be reached.
  virtual at::Tensor open(const Handle& handle) = 0;

  /// Host memory that both processes map: `write` and `wait` may name numbers in it from now on, until `forget`.
  virtual void adopt(void* host_memory, size_t bytes) = 0;
  virtual void forget(void* host_memory) noexcept = 0;

  /// Queues a store of `value`, which whoever sees it sees after all that was queued on the stream before.
  virtual void write(const c10::Stream& stream, std::atomic<uint32_t>& number, uint32_t value) = 0;

  /// What is queued on the stream from now on begins when the number is `value` or, counting in a circle, more.
  /// To be called only once the write that ends the wait has been queued: then no streams can wait for each other,
  /// however many share one queue of the hardware. The host may end the wait by a store.
  virtual void wait(const c10::Stream& stream, const std::atomic<uint32_t>& number, uint32_t value) = 0;
};

}  // namespace pp_runtime
