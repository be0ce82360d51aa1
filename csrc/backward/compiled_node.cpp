#include "precompiled.h"

#include "backward/compiled_node.h"

#include "backward/python_nodes.h"

#include <utility>

namespace pp_runtime {

using torch::autograd::variable_list;

bool is_compiled_region(const torch::autograd::Node& node) {
  return is_python_function(node, "CompiledFunctionBackward");
}

variable_list CompiledNode::apply(variable_list&& gradients) {
  if (in_weight_half()) {
    return hand_on(halves_->weight_gradients());
  }
  variable_list final_gradients = run_hooks_before(whole(), std::move(gradients));
  halves_ = CompiledHalves::open();
  variable_list outputs;
  try {
    outputs = whole()(std::move(final_gradients));
  } catch (...) {
    halves_->close();
    throw;
  }
  halves_->close();
  whole().release_variables();
  std::vector<bool> on_weight_side;
  for (const auto& edge : weight_edges()) {
    on_weight_side.push_back(edge.is_valid());
  }
  return halves_->input_gradients(std::move(outputs), on_weight_side);
}

void CompiledNode::release_variables() {
  // The engine calls this after each half.
  if (in_weight_half()) {
    halves_.reset();
  }
}

}  // namespace pp_runtime
