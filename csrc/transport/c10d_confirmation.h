#pragma once

#include "transport/c10d.h"
#include "transport/confirmation.h"

#include <memory>

namespace pp_runtime {

/// Through a process group: every rank tells rank 0, and rank 0 tells every rank.
class C10dConfirmation : public Confirmation {
 public:
  /// `path.peer` is not used.
  C10dConfirmation(C10dPath path, int ranks, int own_rank, std::shared_ptr<WaitGuard> guard);

  void confirm() override;

 private:
  void send(int peer);
  void receive(int peer);

  C10dPath path_;
  int ranks_;
  int own_rank_;
  std::shared_ptr<WaitGuard> guard_;
};

}  // namespace pp_runtime
