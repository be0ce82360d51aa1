#pragma once

#include <torch/csrc/autograd/function.h>

namespace pp_runtime {

/// How torch owns its nodes.
using NodePointer = decltype(torch::autograd::Edge::function);

/// Where a backward begins: gradients and the edges they enter the graph by. A root without gradient is not listed.
struct Roots {
  torch::autograd::edge_list edges;
  torch::autograd::variable_list grads;
};

}  // namespace pp_runtime
