#pragma once

#include "oversight/peer_memory.h"

#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace pp_runtime::cuda {

/// Device memory of a GPU that other processes of the host map: CUDA's virtual memory, exported as file descriptors;
/// stream memory operations on registered host memory. The driver is asked for its functions, so nothing links with it.
class CudaPeerMemory final : public PeerMemory {
 public:
  /// Throws std::runtime_error where the device, its driver or this process's rights lack what it takes.
  explicit CudaPeerMemory(c10::Device device);

  /// The GPU's UUID: ranks may see the host's GPUs under other numbers.
  std::string name() const override { return name_; }
  Mapping allocate(const std::string& device, size_t bytes) override;
  at::Tensor open(const Handle& handle) override;
  void adopt(void* host_memory, size_t bytes) override;
  void forget(void* host_memory) noexcept override;
  void write(const c10::Stream& stream, std::atomic<uint32_t>& number, uint32_t value) override;
  void wait(const c10::Stream& stream, const std::atomic<uint32_t>& number, uint32_t value) override;

 private:
  /// Where the device sees a number that lies in adopted host memory.
  uintptr_t on_device(const void* number);

  struct Adopted {
    size_t bytes;
    uintptr_t device_address;
  };

  c10::Device device_;
  std::string name_;
  std::mutex mutex_;
  /// By its address on the host.
  std::map<uintptr_t, Adopted> adopted_;
};

}  // namespace pp_runtime::cuda
