#pragma once

#include "transport/c10d.h"
#include "transport/doorbell.h"
#include "transport/segment.h"
#include "transport/shared_memory.h"

#include <memory>
#include <vector>

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
  SharedConfirmation(std::shared_ptr<Segment> segment, std::vector<Peer> ranks, size_t own_rank,
                     std::shared_ptr<Watch> watch, SpinTime spin);
  ~SharedConfirmation() override;

  void confirm() override;

 private:
  std::shared_ptr<Segment> segment_;
  std::vector<Peer> ranks_;
  std::vector<int> handles_;
  size_t own_rank_;
  std::shared_ptr<Watch> watch_;
  SpinTime spin_;
  uint32_t steps_ = 0;
};

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
