#include "transport/confirmation.h"

#include <ATen/Functions.h>

#include <unistd.h>

#include <new>

namespace pp_runtime {

std::shared_ptr<Segment> SharedConfirmation::make(size_t ranks) {
  auto segment = Segment::create(ranks * kPayloadAlignment);
  for (size_t rank = 0; rank < ranks; ++rank) {
    new (segment->data() + rank * kPayloadAlignment) Doorbell;
  }
  return segment;
}

SharedConfirmation::SharedConfirmation(std::shared_ptr<Segment> segment, std::vector<Peer> ranks, size_t own_rank,
                                       std::shared_ptr<Watch> watch, SpinTime spin)
    : segment_(std::move(segment)),
      ranks_(std::move(ranks)),
      own_rank_(own_rank),
      watch_(std::move(watch)),
      spin_(spin) {
  for (const Peer& peer : ranks_) {
    handles_.push_back(open_process(peer.pid));
  }
}

SharedConfirmation::~SharedConfirmation() {
  for (const int handle : handles_) {
    if (handle >= 0) {
      close(handle);
    }
  }
}

void SharedConfirmation::confirm() {
  const auto bell = [this](size_t rank) -> Doorbell& {
    return *reinterpret_cast<Doorbell*>(segment_->data() + rank * kPayloadAlignment);
  };
  ++steps_;
  bell(own_rank_).raise();
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    // Counts of a step are passed on the way to the next one's, so a count ahead of ours is fine; it wraps around.
    const auto arrived = [&] {
      return static_cast<int32_t>(bell(rank).count.load(std::memory_order_acquire) - steps_) >= 0;
    };
    wait_for_peer(ranks_[rank], handles_[rank], *watch_, spin_, arrived,
                  [&](std::chrono::nanoseconds spin) { bell(rank).wait(steps_ - 1, spin, Watch::kInterval); });
  }
}

C10dConfirmation::C10dConfirmation(C10dPath path, int ranks, int own_rank, std::shared_ptr<WaitGuard> guard)
    : path_(std::move(path)), ranks_(ranks), own_rank_(own_rank), guard_(std::move(guard)) {}

void C10dConfirmation::send(int peer) {
  std::vector<at::Tensor> word = {at::zeros({1}, at::kByte)};
  guard_->wait(path_.group->send(word, peer, path_.tag), peer);
}

void C10dConfirmation::receive(int peer) {
  std::vector<at::Tensor> word = {at::zeros({1}, at::kByte)};
  guard_->wait(path_.group->recv(word, peer, path_.tag), peer);
}

void C10dConfirmation::confirm() {
  if (own_rank_ != 0) {
    send(0);
    receive(0);
    return;
  }
  for (int rank = 1; rank < ranks_; ++rank) {
    receive(rank);
  }
  for (int rank = 1; rank < ranks_; ++rank) {
    send(rank);
  }
}

}  // namespace pp_runtime
