#include "transport/confirmation.h"

#include "oversight/signals.h"
#include "transport/message.h"

#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace pp_runtime {

namespace {

/// No count of steps: those wrap around before.
constexpr uint32_t kFailed = UINT32_MAX;
constexpr std::chrono::milliseconds kPause{1};

uint32_t after(uint32_t steps) { return (steps + 1) % kFailed; }

}  // namespace

size_t SharedConfirmation::bytes(size_t ranks) { return (ranks + 1) * kPayloadAlignment; }

std::shared_ptr<Segment> SharedConfirmation::make(size_t ranks) {
  auto segment = Segment::create(bytes(ranks));
  for (size_t rank = 0; rank < ranks; ++rank) {
    new (segment->data() + rank * kPayloadAlignment) Doorbell;
  }
  new (segment->data() + ranks * kPayloadAlignment) std::atomic<uint32_t>{0};
  return segment;
}

SharedConfirmation::SharedConfirmation(std::shared_ptr<Segment> segment, size_t ranks, size_t own_rank,
                                       std::shared_ptr<Watch> watch, SpinTime spin)
    : segment_(std::move(segment)), ranks_(ranks), own_rank_(own_rank), watch_(std::move(watch)), spin_(spin) {
  if (segment_->bytes() < bytes(ranks_) || own_rank_ >= ranks_) {
    throw std::runtime_error("the segment for the end of a step is too small for " + std::to_string(ranks_) + " ranks");
  }
}

Doorbell& SharedConfirmation::bell(size_t rank) const {
  return *reinterpret_cast<Doorbell*>(segment_->data() + rank * kPayloadAlignment);
}

std::atomic<uint32_t>& SharedConfirmation::verdict() const {
  return *reinterpret_cast<std::atomic<uint32_t>*>(segment_->data() + ranks_ * kPayloadAlignment);
}

void SharedConfirmation::confirm() {
  const uint32_t before = steps_ % kFailed;
  const uint32_t done = after(before);
  ++steps_;
  bell(own_rank_).raise();
  uint32_t written = before;
  try {
    wait_for_all();
  } catch (const Interrupted&) {
    // Its own user wants to stop, also where the step is done.
    verdict().compare_exchange_strong(written, kFailed);
    throw;
  } catch (const std::exception&) {
    if (verdict().compare_exchange_strong(written, kFailed) || written != done) {
      throw;
    }
    return;
  }
  if (!verdict().compare_exchange_strong(written, done) && written != done) {
    // Another rank gave up, and is about to say why.
    wait_for_peers(
        *watch_, spin_, [] { return false; }, [](std::chrono::nanoseconds) { std::this_thread::sleep_for(kPause); });
  }
}

void SharedConfirmation::wait_for_all() {
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
