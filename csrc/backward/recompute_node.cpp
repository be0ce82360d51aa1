#include "precompiled.h"

#include "backward/recompute_node.h"

#include "backward/python_nodes.h"

#include <utility>

namespace pp_runtime {

using torch::autograd::edge_list;
using torch::autograd::variable_list;

RecomputeNode::RecomputeNode(NodePointer checkpoint)
    : Node(checkpoint->sequence_nr(), edge_list(checkpoint->next_edges())), checkpoint_(std::move(checkpoint)) {
  for (size_t i = 0; i < checkpoint_->num_inputs(); ++i) {
    input_metadata_.emplace_back(checkpoint_->input_metadata(i));
  }
}

variable_list RecomputeNode::apply(variable_list&& gradients) {
  gradients = run_hooks_before(*checkpoint_, std::move(gradients));
  const Recomputed recomputed = recompute(*checkpoint_);
  checkpoint_->release_variables();
  Roots roots;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].defined() && recomputed.outputs.at(i).is_valid()) {
      roots.edges.push_back(recomputed.outputs[i]);
      roots.grads.push_back(std::move(gradients[i]));
    }
  }
  edge_list inputs;
  for (const auto& edge : recomputed.inputs) {
    if (edge.is_valid()) {
      inputs.push_back(edge);
    }
  }
  InputGradients halves = captured_input_backward(std::move(roots), inputs);
  weight_half_ = std::move(halves.weight_half);
  variable_list result(num_outputs());
  auto found = halves.gradients.begin();
  for (size_t i = 0; i < result.size(); ++i) {
    if (recomputed.inputs.at(i).is_valid()) {
      result[i] = std::move(*found++);
    }
  }
  return result;
}

std::string RecomputeNode::name() const { return checkpoint_->name(); }

std::unique_ptr<WeightHalf> RecomputeNode::take_weight_half() { return std::move(weight_half_); }

}  // namespace pp_runtime
