#pragma once

#include "oversight/segment.h"
#include "transport/doorbell.h"
#include "transport/peer.h"

#include <atomic>
#include <memory>

namespace pp_runtime {

/// The end of a step on all ranks: a rank returns from it when every rank has come there, or throws what stopped one of
/// them.
///
/// Without it a rank that is done with its part would return, and its user would take an optimizer step, while another
/// rank may still fail in the same step.
class Confirmation {
 public:
  virtual ~Confirmation() = default;
  /// No GIL.
  virtual void confirm() = 0;
};

/// Between ranks that share memory: a doorbell a rank and a verdict, in a segment that rank 0 made.
///
/// A rank that gives up while it waits here (another one is lost, or late) has rung its bell already, so the others
/// could still end the step. The verdict makes the step's end one and the same for all: the first to see every bell
/// writes that the step is done, the first to give up that it failed, and who comes second takes what is written.
class SharedConfirmation : public Confirmation {
 public:
  /// The segment itself; the others open it by its descriptor.
  static std::shared_ptr<Segment> make(size_t ranks);
  /// `segment` may come from another process; throws std::runtime_error where it is too small for the ranks.
  SharedConfirmation(std::shared_ptr<Segment> segment, size_t ranks, size_t own_rank, std::shared_ptr<Watch> watch,
                     SpinTime spin);

  void confirm() override;
  static size_t bytes(size_t ranks);

 private:
  Doorbell& bell(size_t rank) const;
  std::atomic<uint32_t>& verdict() const;
  void wait_for_all();

  std::shared_ptr<Segment> segment_;
  size_t ranks_;
  size_t own_rank_;
  std::shared_ptr<Watch> watch_;
  SpinTime spin_;
  uint32_t steps_ = 0;
};

}  // namespace pp_runtime
