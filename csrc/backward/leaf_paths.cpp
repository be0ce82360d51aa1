#include "precompiled.h"

#include "backward/leaf_paths.h"

#include "backward/weight_products.h"

#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <typeinfo>
#include <utility>

namespace pp_runtime {

using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::variable_list;

namespace {

bool has_hooks(Node& node) {
  // Hooks that run after the accumulation are the leaf's own work.
  return !node.tensor_pre_hooks().empty() || !node.pre_hooks().empty() || !node.post_hooks().empty() ||
         !node.retains_grad_hooks().empty();
}

bool is_leaf_on_cpu(const Node& node) {
  if (typeid(node) != typeid(AccumulateGrad)) {
    return false;
  }
  const at::Tensor& variable = static_cast<const AccumulateGrad&>(node).variable;
  return variable.defined() && variable.is_cpu();
}

}  // namespace

void LeafPaths::count(const edge_list& edges) {
  const auto arrive = [this](const edge_list& from) {
    for (const Edge& edge : from) {
      if (edge.is_valid() && ++arrivals_[edge.function.get()] == 1) {
        to_visit_.push_back(edge.function.get());
      }
    }
  };
  arrive(edges);
  while (!to_visit_.empty()) {
    Node* node = to_visit_.back();
    to_visit_.pop_back();
    arrive(node->next_edges());
  }
}

bool LeafPaths::is_free(const Edge& edge) const {
  const Edge* at = &edge;
  while (at->is_valid()) {
    Node& node = *at->function;
    const auto arrivals = arrivals_.find(&node);
    if (arrivals == arrivals_.end() || arrivals->second != 1 || has_hooks(node)) {
      return false;
    }
    if (is_leaf_on_cpu(node)) {
      return true;
    }
    if (!is_transposition_or_cast(node) || node.num_outputs() != 1) {
      return false;
    }
    at = &node.next_edge(0);
  }
  return false;
}

void LeafPaths::follow(const Node& node, const edge_list& edges, variable_list& gradients) {
  torch::autograd::validate_outputs(edges, gradients, [&node](const std::string& message) {
    return "Function " + node.name() + " returned an invalid gradient: " + message;
  });
  for (size_t i = 0; i < edges.size(); ++i) {
    if (!edges[i].is_valid() || !gradients[i].defined()) {
      continue;
    }
    Node& next = *edges[i].function;
    variable_list input{std::move(gradients[i])};
    variable_list made = next(std::move(input));
    next.release_variables();
    if (!made.empty()) {
      follow(next, next.next_edges(), made);
    }
  }
}

}  // namespace pp_runtime
