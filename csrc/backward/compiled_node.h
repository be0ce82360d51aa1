#pragma once

#include "backward/half_nodes.h"

#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

class CompiledHalves;

/// Whether the node runs the backward of a compiled region. Called for every frontier node: quick, no GIL.
bool is_compiled_region(const torch::autograd::Node& node);

/// Runs the backward of a compiled region in its two halves, where its compiler is ours and made them
/// (pp_runtime/running/compiled/backward.py); otherwise whole in I, as a KeepNode's, and hands on in W what it made for
/// the weights.
class CompiledNode final : public StandInNode {
 public:
  using StandInNode::StandInNode;

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override;
  void release_variables() override;

 private:
  std::shared_ptr<CompiledHalves> halves_;
};

}  // namespace pp_runtime
