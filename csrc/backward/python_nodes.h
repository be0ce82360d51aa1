#pragma once

#include "backward/graph.h"

namespace pp_runtime {

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

}  // namespace pp_runtime
