#pragma once

#include "backward/half_nodes.h"
#include "backward/split_backward.h"

#include <memory>
#include <string>

namespace pp_runtime {

/// Stands for a reentrant checkpoint on the input side. The checkpoint's own backward would run the function again and
/// then its whole backward; this runs the function again and then its input half, and leaves the weight half for W. So
/// a block's forward runs twice in all, and its weights' hooks fire in W.
class RecomputeNode final : public torch::autograd::Node {
 public:
  explicit RecomputeNode(NodePointer checkpoint);

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override;
  std::string name() const override;

  /// What I left, once I is over; null when no gradient came.
  std::unique_ptr<WeightHalf> take_weight_half();

 private:
  const NodePointer checkpoint_;
  std::unique_ptr<WeightHalf> weight_half_;
};

}  // namespace pp_runtime
