#include "precompiled.h"

#include "backward/split_backward.h"

#include "backward/full_backward.h"
#include "backward/graph_splitter.h"
#include "backward/half_nodes.h"
#include "backward/leaf_paths.h"

#include <torch/csrc/autograd/anomaly_mode.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <unordered_map>
#include <utility>

namespace pp_runtime {

using torch::autograd::Edge;
using torch::autograd::edge_list;

namespace {

/// Runs the input side and returns what is left. The splitter knows the inputs.
std::unique_ptr<WeightHalf> run_input_half(GraphSplitter splitter, Roots roots) {
  Roots input_roots;
  Roots weight_roots;
  for (size_t i = 0; i < roots.edges.size(); ++i) {
    splitter.visit(roots.edges[i].function.get());
    Roots& side = splitter.redirect(roots.edges[i]) ? input_roots : weight_roots;
    side.edges.push_back(std::move(roots.edges[i]));
    side.grads.push_back(std::move(roots.grads[i]));
  }
  const auto recomputes = splitter.take_recomputes();
  if (!input_roots.edges.empty()) {
    StartNode::execute(std::move(input_roots), /*keep_graph=*/false, splitter.take_replaced());
  }
  std::vector<Owned<HalfNode>> halves = splitter.take_halves();
  for (const auto& half : halves) {
    half->begin_weight_half();
  }
  auto weight_half = std::make_unique<WeightHalf>(std::move(halves), std::move(weight_roots));
  for (const auto& node : recomputes) {
    if (auto recomputed = node->take_weight_half()) {
      weight_half->absorb(std::move(*recomputed));
    }
  }
  return weight_half;
}

/// Takes out the halves that the engine has nothing to do with.
std::vector<Owned<HalfNode>> take_independent(std::vector<Owned<HalfNode>>& halves, const Roots& roots) {
  LeafPaths paths;
  paths.count(roots.edges);
  for (const auto& half : halves) {
    paths.count(half->next_edges());
  }
  const auto first =
      std::stable_partition(halves.begin(), halves.end(), [&paths](const auto& half) { return !half->shorten(paths); });
  std::vector<Owned<HalfNode>> independent(std::make_move_iterator(first), std::make_move_iterator(halves.end()));
  halves.erase(first, halves.end());
  return independent;
}

}  // namespace

WeightHalf::WeightHalf(std::vector<Owned<HalfNode>> halves, Roots roots)
    : halves_(std::move(halves)), roots_(std::move(roots)) {}

WeightHalf::~WeightHalf() = default;

void WeightHalf::run(bool keep_graph) {
  if (has_run_) {
    throw std::runtime_error("This microbatch's weight gradients were computed already: a WeightHalf runs once.");
  }
  has_run_ = true;
  Roots roots = std::move(roots_);
  std::sort(halves_.begin(), halves_.end(),
            [](const auto& left, const auto& right) { return left->sequence_nr() > right->sequence_nr(); });
  if (!keep_graph && !torch::autograd::AnomalyMode::is_enabled()) {
    if (auto independent = take_independent(halves_, roots); !independent.empty()) {
      roots.edges.emplace_back(make_node<HalvesNode>(std::move(independent)), 0);
      roots.grads.emplace_back();
    }
  }
  for (size_t i = 0; i + 1 < halves_.size(); ++i) {
    halves_[i]->run_before(halves_[i + 1]);
  }
  if (!halves_.empty()) {
    roots.edges.emplace_back(std::move(halves_.front()), 0);
    roots.grads.emplace_back();
    halves_.clear();
  }
  if (!roots.edges.empty()) {
    StartNode::execute(std::move(roots), keep_graph);
  }
}

void WeightHalf::absorb(WeightHalf&& other) {
  std::move(other.halves_.begin(), other.halves_.end(), std::back_inserter(halves_));
  std::move(other.roots_.edges.begin(), other.roots_.edges.end(), std::back_inserter(roots_.edges));
  std::move(other.roots_.grads.begin(), other.roots_.grads.end(), std::back_inserter(roots_.grads));
}

edge_list WeightHalf::edges() const {
  edge_list edges = roots_.edges;
  for (const auto& half : halves_) {
    edges.emplace_back(half, 0);
  }
  return edges;
}

std::unique_ptr<WeightHalf> input_backward(Roots roots, const std::vector<NodePointer>& input_nodes) {
  GraphSplitter splitter;
  for (const NodePointer& node : input_nodes) {
    splitter.add_input(node.get(), node.get());
  }
  if (input_nodes.empty()) {
    return std::make_unique<WeightHalf>(std::vector<Owned<HalfNode>>(), std::move(roots));
  }
  return run_input_half(std::move(splitter), std::move(roots));
}

InputGradients captured_input_backward(Roots roots, const edge_list& inputs) {
  GraphSplitter splitter;
  // Several inputs may come from one node (the parts of an unbind).
  std::unordered_map<torch::autograd::Node*, Owned<CaptureNode>> captures;
  for (const Edge& input : inputs) {
    auto& capture = captures[input.function.get()];
    if (!capture) {
      capture = make_node<CaptureNode>(input.function);
      splitter.add_input(input.function.get(), capture.get());
    }
  }
  InputGradients result;
  result.weight_half = run_input_half(std::move(splitter), std::move(roots));
  for (const Edge& input : inputs) {
    result.gradients.push_back(captures[input.function.get()]->gradient(input.input_nr));
  }
  for (const auto& [node, capture] : captures) {
    capture->let_go();
  }
  return result;
}

}  // namespace pp_runtime
