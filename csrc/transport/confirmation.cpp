#include "transport/confirmation.h"

#include "message.h"

#include <new>
#include <stdexcept>
#include <utility>

namespace pp_runtime {

std::shared_ptr<Segment> SharedConfirmation::make(size_t ranks) {
  auto segment = Segment::create(ranks * kPayloadAlignment);
  for (size_t rank = 0; rank < ranks; ++rank) {
    new (segment->data() + rank * kPayloadAlignment) Doorbell;
  }
  return segment;
}

SharedConfirmation::SharedConfirmation(std::shared_ptr<Segment> segment, size_t ranks, size_t own_rank,
                                       std::shared_ptr<Watch> watch, SpinTime spin)
    : segment_(std::move(segment)), ranks_(ranks), own_rank_(own_rank), watch_(std::move(watch)), spin_(spin) {
  if (segment_->bytes() / kPayloadAlignment < ranks_ || own_rank_ >= ranks_) {
    throw std::runtime_error("the segment for the end of a step is too small for " + std::to_string(ranks_) + " ranks");
  }
}

void SharedConfirmation::confirm() {
  const auto bell = [this](size_t rank) -> Doorbell& {
    return *reinterpret_cast<Doorbell*>(segment_->data() + rank * kPayloadAlignment);
  };
  ++steps_;
  bell(own_rank_).raise();
  for (size_t rank = 0; rank < ranks_; ++rank) {
    // Counts of a step are passed on the way to the next one's, so a count ahead of ours is fine; it wraps around.
    const auto arrived = [&] {
      return static_cast<int32_t>(bell(rank).count.load(std::memory_order_acquire) - steps_) >= 0;
    };
    wait_for_peers(*watch_, spin_, arrived,
                   [&](std::chrono::nanoseconds spin) { bell(rank).wait(steps_ - 1, spin, Watch::kInterval); });
  }
}

}  // namespace pp_runtime
