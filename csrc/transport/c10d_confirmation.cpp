#include "transport/c10d_confirmation.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <utility>

namespace pp_runtime {

namespace {

/// Seconds; a rank looks longer than that before it gives up.
constexpr double kLongStep = 0.4;

}  // namespace

C10dConfirmation::C10dConfirmation(C10dPath path, int ranks, int own_rank, std::shared_ptr<WaitGuard> guard)
    : path_(std::move(path)), ranks_(ranks), own_rank_(own_rank), guard_(std::move(guard)) {}

void C10dConfirmation::send(int peer) {
  std::vector<at::Tensor> word = {at::zeros({1}, at::kByte)};
  guard_->wait(guard_->post(peer, [&] { return path_.group->send(word, peer, path_.tag); }), peer);
}

void C10dConfirmation::receive(int peer) {
  std::vector<at::Tensor> word = {at::zeros({1}, at::kByte)};
  guard_->wait(guard_->post(peer, [&] { return path_.group->recv(word, peer, path_.tag); }), peer);
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
  const std::chrono::duration<double> taken = Watch::Clock::now() - last_;
  if (taken.count() > std::min(kLongStep, guard_->watch().deadline() / 2)) {
    guard_->watch().look_for_failure(Watch::Clock::now());
  }
  for (int rank = 1; rank < ranks_; ++rank) {
    send(rank);
  }
  last_ = Watch::Clock::now();
}

}  // namespace pp_runtime
