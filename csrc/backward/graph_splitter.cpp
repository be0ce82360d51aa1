#include "precompiled.h"

#include "backward/graph_splitter.h"

#include "backward/compiled_node.h"
#include "backward/python_nodes.h"
#include "backward/weight_products.h"

#include <torch/csrc/autograd/functions/tensor.h>

#include <algorithm>
#include <typeinfo>
#include <utility>

namespace pp_runtime {

using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;

namespace {

/// An in-place operation on a view runs inside CopySlices, which wants their edges beyond the first to be the same.
void rewire_copied_operation(torch::autograd::CopySlices& node) {
  edge_list& edges = node.fn->next_edges();
  std::copy(node.next_edges().begin() + 1, node.next_edges().end(), edges.begin() + 1);
}

}  // namespace

void GraphSplitter::add_input(Node* input, Node* stand_in) { places_[input] = {true, stand_in}; }

bool GraphSplitter::enter(Node* node) {
  // A leaf that is no input needs no place: what is unknown is on the weight side.
  if (node->num_outputs() == 0 || !places_.emplace(node, Place{}).second) {
    return false;
  }
  // Asked before the node's children are settled, which will want to know.
  if (const WeightProduct* product = weight_product_of(*node); product != nullptr && !inside_checkpoint_) {
    inside_checkpoint_ = product->saves_behind_hooks(*node);
  }
  path_.push_back({node, 0});
  return true;
}

void GraphSplitter::visit(Node* root) {
  enter(root);
  while (!path_.empty()) {
    Step& step = path_.back();
    const edge_list& edges = step.node->next_edges();
    bool entered = false;
    while (!entered && step.next_child < edges.size()) {
      const Edge& edge = edges[step.next_child++];
      entered = edge.is_valid() && enter(edge.function.get());
    }
    if (!entered) {
      settle(*path_.back().node);
      path_.pop_back();
    }
  }
}

bool GraphSplitter::redirect(Edge& edge) const {
  const auto place = places_.find(edge.function.get());
  if (place == places_.end() || !place->second.on_input_side) {
    return false;
  }
  if (place->second.stand_in != nullptr && place->second.stand_in != edge.function.get()) {
    edge.function = place->second.stand_in->getptr();
  }
  return true;
}

void GraphSplitter::settle(Node& node) {
  edge_list& edges = node.next_edges();
  on_weight_side_.assign(edges.size(), 0);
  bool has_input_edge = false;
  bool has_weight_edge = false;
  for (size_t i = 0; i < edges.size(); ++i) {
    if (edges[i].is_valid()) {
      const bool leads_to_input = redirect(edges[i]);
      has_input_edge |= leads_to_input;
      has_weight_edge |= !leads_to_input;
      on_weight_side_[i] = !leads_to_input;
    }
  }
  if (!has_input_edge && !must_run_in_input_half(node)) {
    return;
  }
  Place& place = places_[&node];
  place.on_input_side = true;
  if (has_weight_edge) {
    place.stand_in = halve(node);
  }
  if (is_reentrant_checkpoint(node) && node.post_hooks().empty()) {
    recomputes_.push_back(make_node<RecomputeNode>(node.getptr()));
    place.stand_in = recomputes_.back().get();
  }
  if (typeid(node) == typeid(torch::autograd::CopySlices)) {
    rewire_copied_operation(static_cast<torch::autograd::CopySlices&>(node));
  }
}

bool GraphSplitter::must_run_in_input_half(Node& node) const { return inside_checkpoint_ && saves_behind_hooks(node); }

Node* GraphSplitter::halve(Node& node) {
  // A post hook sees all gradients that its node made, so its node makes them at once.
  const WeightProduct* product = node.post_hooks().empty() ? weight_product_of(node) : nullptr;
  bool worth_splitting = false;
  for (size_t i = 0; product != nullptr && i < on_weight_side_.size(); ++i) {
    worth_splitting |= on_weight_side_[i] && product->is_product(i);
  }
  if (worth_splitting) {
    return stand_in<SplitNode>(node, *product);
  }
  if (is_compiled_region(node) && node.post_hooks().empty()) {
    return stand_in<CompiledNode>(node);
  }
  keep(node);
  return nullptr;
}

template <class StandIn, class... Arguments>
Node* GraphSplitter::stand_in(Node& node, Arguments&&... arguments) {
  edge_list& edges = node.next_edges();
  edge_list input_edges(edges.size());
  edge_list weight_edges(edges.size());
  for (size_t i = 0; i < edges.size(); ++i) {
    (on_weight_side_[i] ? weight_edges : input_edges)[i] = std::move(edges[i]);
  }
  auto stand_in = make_node<StandIn>(node.getptr(), std::move(input_edges), std::move(weight_edges),
                                     std::forward<Arguments>(arguments)...);
  if (stand_in->has_hooks()) {
    replaced_.push_back(&node);
  }
  halves_.push_back(std::move(stand_in));
  return halves_.back().get();
}

void GraphSplitter::keep(Node& node) {
  edge_list& edges = node.next_edges();
  edge_list weight_edges;
  for (size_t i = 0; i < edges.size(); ++i) {
    if (on_weight_side_[i]) {
      weight_edges.push_back(std::move(edges[i]));
    }
  }
  auto keep = make_node<KeepNode>(node.sequence_nr(), std::move(weight_edges));
  for (size_t i = 0, kept = 0; i < edges.size(); ++i) {
    if (on_weight_side_[i]) {
      edges[i] = Edge(keep, kept++);
    }
  }
  halves_.push_back(std::move(keep));
}

}  // namespace pp_runtime
