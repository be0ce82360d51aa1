#include "transport/c10d_confirmation.h"

#include <ATen/Functions.h>

#include <utility>

namespace pp_runtime {

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
