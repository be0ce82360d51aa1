#pragma once

#include "backward/graph.h"

#include <memory>
#include <vector>

namespace pp_runtime {

/// Whether the node is the backward of a Python function, and of a class of this name. Quick, no GIL.
bool is_python_function(const torch::autograd::Node& node, const char* class_name);

/// Whether the node is the backward of torch's reentrant checkpoint. Called for every node of the input side: quick, no
/// GIL.
bool is_reentrant_checkpoint(const torch::autograd::Node& node);

/// Whether any tensor that the node saved stands behind hooks. Takes the GIL.
bool saves_behind_hooks(torch::autograd::Node& node);

/// What running a checkpointed function again gave: edges of its outputs, and of the detached copies of its tensor
/// inputs, invalid where no gradient flows.
struct Recomputed {
  torch::autograd::edge_list outputs;
  torch::autograd::edge_list inputs;
};

/// Runs the function of a reentrant checkpoint again, with gradients on. Takes the GIL.
Recomputed recompute(const torch::autograd::Node& checkpoint);

/// One run of a compiled region's backward in two halves: a Python Request. Takes the GIL in all that it does.
class CompiledHalves {
 public:
  virtual ~CompiledHalves() = default;
  /// From here until it is closed, the compiled backward that runs on this thread leaves its work to this.
  static std::shared_ptr<CompiledHalves> open();
  virtual void close() = 0;
  /// I. `outputs` are what the region's node returned; one gradient each, undefined on the weight side.
  virtual torch::autograd::variable_list input_gradients(torch::autograd::variable_list outputs,
                                                         const std::vector<bool>& on_weight_side) = 0;
  /// W; undefined on the input side.
  virtual torch::autograd::variable_list weight_gradients() = 0;
};

}  // namespace pp_runtime
