#include "precompiled.h"

#include "lanes/recorded_peer_memory.h"

#include "oversight/segment.h"

#include <ATen/ops/from_blob.h>

#include <memory>
#include <stdexcept>

namespace pp_runtime {

namespace {

at::Tensor over(const std::shared_ptr<Segment>& segment) {
  return at::from_blob(segment->data(), {static_cast<int64_t>(segment->bytes())}, [segment](void*) {}, at::kByte);
}

}  // namespace

PeerMemory::Mapping RecordedPeerMemory::allocate(const std::string&, size_t bytes) {
  const std::shared_ptr<Segment> segment = Segment::create(bytes);
  return {.bytes = over(segment), .fd = segment->fd()};
}

at::Tensor RecordedPeerMemory::open(const Handle& handle) {
  return over(Segment::open(handle.pid, handle.fd, handle.bytes));
}

void RecordedPeerMemory::write(const c10::Stream&, std::atomic<uint32_t>& number, uint32_t value) {
  number.store(value, std::memory_order_release);
}

void RecordedPeerMemory::wait(const c10::Stream&, const std::atomic<uint32_t>& number, uint32_t value) {
  if (static_cast<int32_t>(number.load(std::memory_order_acquire) - value) < 0) {
    throw std::logic_error("a lane was made to wait for a number that nobody was asked to write");
  }
}

}  // namespace pp_runtime
