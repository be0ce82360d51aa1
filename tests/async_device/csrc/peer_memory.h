#pragma once

#include "oversight/peer_memory.h"

#include <cstdint>
#include <string>
#include <vector>

namespace async_device {

/// Memory of the device that other processes map: memfds, as the device's memory is the host's. Numbers are written and
/// waited for by the streams' threads, late as all that they do.
class PeerMemory final : public pp_runtime::PeerMemory {
 public:
  std::string name() const override;
  Mapping allocate(const std::string& device, size_t bytes) override;
  at::Tensor open(const Handle& handle) override;
  void adopt(void*, size_t) override {}
  void forget(void*) noexcept override {}
  void write(const c10::Stream& stream, std::atomic<uint32_t>& number, uint32_t value) override;
  void wait(const c10::Stream& stream, const std::atomic<uint32_t>& number, uint32_t value) override;
};

/// From now on waits for a peer's number are counted, and the one of this number is left out, -1 for none. Returns
/// which streams waited since the last call.
std::vector<int64_t> leave_out_await(int64_t number);

}  // namespace async_device
