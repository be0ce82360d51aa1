#pragma once

#include "transport/c10d.h"
#include "transport/confirmation.h"

#include <memory>

namespace pp_runtime {

/// Through a process group: every rank tells rank 0, and rank 0 tells every rank.
///
/// A rank that gives up while it waits for rank 0's word has sent its own already. So rank 0 asks for failures before
/// it tells that the step is done; only after a step that was long enough for a rank to give up in.
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
  Watch::Clock::time_point last_ = Watch::Clock::now();
};

}  // namespace pp_runtime
