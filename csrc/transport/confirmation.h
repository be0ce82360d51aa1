#pragma once

#include "transport/doorbell.h"
#include "transport/peer.h"
#include "transport/segment.h"

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

/// Between ranks that share memory: a doorbell a rank, in a segment that rank 0 made.
class SharedConfirmation : public Confirmation {
 public:
  /// The segment itself; the others open it by its descriptor.
  static std::shared_ptr<Segment> make(size_t ranks);
  /// `segment` may come from another process; throws std::runtime_error where it is too small for the ranks.
  SharedConfirmation(std::shared_ptr<Segment> segment, size_t ranks, size_t own_rank, std::shared_ptr<Watch> watch,
                     SpinTime spin);

  void confirm() override;

 private:
  std::shared_ptr<Segment> segment_;
  size_t ranks_;
  size_t own_rank_;
  std::shared_ptr<Watch> watch_;
  SpinTime spin_;
  uint32_t steps_ = 0;
};

}  // namespace pp_runtime
