#pragma once

#include "oversight/peer_memory.h"

#include <string>

namespace pp_runtime {

/// Peer memory of a recorded device, whose tensors lie on the host and whose work is done when it is asked for: memory
/// is a memfd, a write is a store, and a wait finds the number written, unless the rule of `PeerMemory::wait` was
/// broken.
class RecordedPeerMemory final : public PeerMemory {
 public:
  std::string name() const override { return "the host"; }
  Mapping allocate(const std::string& device, size_t bytes) override;
  at::Tensor open(const Handle& handle) override;
  void adopt(void*, size_t) override {}
  void forget(void*) noexcept override {}
  void write(const c10::Stream& stream, std::atomic<uint32_t>& number, uint32_t value) override;
  void wait(const c10::Stream& stream, const std::atomic<uint32_t>& number, uint32_t value) override;
};

}  // namespace pp_runtime
