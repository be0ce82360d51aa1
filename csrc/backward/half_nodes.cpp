#include "precompiled.h"

#include "backward/half_nodes.h"

#include "backward/leaf_paths.h"
#include "backward/weight_products.h"

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace pp_runtime {

using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::variable_list;

namespace {

variable_list run_tensor_hooks(Node& node, variable_list gradients) {
  for (const auto& hook : node.tensor_pre_hooks()) {
    gradients = (*hook)(gradients);
  }
  for (const auto& [output, hook] : node.retains_grad_hooks()) {
    gradients = (*hook)(gradients);
  }
  return gradients;
}

/// The engine wants an input of a root.
const at::Tensor& unread_input() {
  static const at::Tensor kNothing = at::zeros({});
  return kNothing;
}

}  // namespace

variable_list run_hooks_before(Node& node, variable_list gradients) {
  gradients = run_tensor_hooks(node, std::move(gradients));
  for (const auto& hook : node.pre_hooks()) {
    gradients = (*hook)(gradients);
  }
  return gradients;
}

void HalfNode::run_before(const Owned<HalfNode>& next) { next_edges().emplace_back(next, 0); }

bool HalfNode::shorten(const LeafPaths& paths) {
  edge_list& edges = next_edges();
  bool all = true;
  for (size_t i = 0; i < edges.size(); ++i) {
    if (paths.is_free(edges[i])) {
      own_paths_.resize(edges.size());
      own_paths_[i] = std::exchange(edges[i], Edge());
    } else if (edges[i].is_valid()) {
      all = false;
    }
  }
  return all;
}

variable_list HalfNode::hand_on(variable_list gradients) const {
  if (!own_paths_.empty()) {
    LeafPaths::follow(*this, own_paths_, gradients);
  }
  gradients.resize(num_outputs());
  return gradients;
}

StandInNode::StandInNode(NodePointer whole, edge_list input_edges, edge_list weight_edges)
    : HalfNode(whole->sequence_nr(), edge_list(input_edges)),
      whole_(std::move(whole)),
      weight_edges_(std::move(weight_edges)) {
  for (size_t i = 0; i < whole_->num_inputs(); ++i) {
    input_metadata_.emplace_back(whole_->input_metadata(i));
  }
  // A node computes what its valid next edges ask for.
  whole_->next_edges() = std::move(input_edges);
}

std::string StandInNode::name() const { return whole_->name(); }

void StandInNode::begin_weight_half() {
  in_weight_half_ = true;
  whole_->next_edges() = weight_edges_;
  next_edges() = std::move(weight_edges_);
}

bool StandInNode::has_hooks() const { return !whole_->tensor_pre_hooks().empty() || !whole_->pre_hooks().empty(); }

SplitNode::SplitNode(NodePointer whole, edge_list input_edges, edge_list weight_edges, const WeightProduct& product)
    : StandInNode(std::move(whole), std::move(input_edges), std::move(weight_edges)), product_(product) {}

variable_list SplitNode::apply(variable_list&& gradients) {
  if (in_weight_half()) {
    return hand_on(whole()(std::move(gradients_)));
  }
  // The engine runs this node's hooks, and it has none: the whole node's run here, once, and W sees what they made.
  variable_list final_gradients = run_hooks_before(whole(), std::move(gradients));
  product_.keep_unpacked(whole());
  gradients_ = final_gradients;
  return whole()(std::move(final_gradients));
}

void SplitNode::release_variables() {
  // The engine calls this after each half; only after W is nothing needed any more.
  if (in_weight_half()) {
    gradients_.clear();
    whole().release_variables();
  }
}

void SplitNode::begin_weight_half() {
  product_.release_input_half(whole(), weight_edges());
  StandInNode::begin_weight_half();
}

KeepNode::KeepNode(uint64_t sequence_nr, edge_list weight_edges)
    : HalfNode(sequence_nr), weight_edges_(std::move(weight_edges)) {
  for (const Edge& edge : weight_edges_) {
    input_metadata_.emplace_back(edge.function->input_metadata(edge.input_nr));
  }
}

variable_list KeepNode::apply(variable_list&& gradients) {
  if (in_weight_half_) {
    return hand_on(std::move(gradients_));
  }
  gradients_ = std::move(gradients);
  return {};
}

void KeepNode::begin_weight_half() {
  in_weight_half_ = true;
  next_edges() = std::move(weight_edges_);
}

std::string KeepNode::name() const { return "pp_runtime::KeepNode"; }

HalvesNode::HalvesNode(std::vector<Owned<HalfNode>> halves) : halves_(std::move(halves)) {
  add_input_metadata(unread_input());
}

variable_list HalvesNode::apply(variable_list&&) {
  for (auto& half : halves_) {
    half->apply({});
    half->release_variables();
    half.reset();
  }
  return {};
}

std::string HalvesNode::name() const { return "pp_runtime::HalvesNode"; }

CaptureNode::CaptureNode(NodePointer captured)
    : Node(captured->sequence_nr()), captured_(std::move(captured)), gradients_(captured_->num_inputs()) {
  for (size_t i = 0; i < captured_->num_inputs(); ++i) {
    input_metadata_.emplace_back(captured_->input_metadata(i));
  }
}

variable_list CaptureNode::apply(variable_list&& gradients) {
  gradients_ = run_tensor_hooks(*captured_, std::move(gradients));
  return {};
}

std::string CaptureNode::name() const { return "pp_runtime::CaptureNode"; }

at::Tensor CaptureNode::gradient(size_t input_nr) const { return gradients_.at(input_nr); }

StartNode::StartNode(Roots roots, std::vector<Node*> replaced)
    : Node(std::numeric_limits<uint64_t>::max(), std::move(roots.edges)),
      gradients_(std::move(roots.grads)),
      replaced_(std::move(replaced)) {
  // Metadata of a device gradient carries the stream that made it, which its reader then waits for.
  const auto on_device = std::find_if(gradients_.begin(), gradients_.end(), [](const at::Tensor& gradient) {
    return gradient.defined() && !gradient.is_cpu();
  });
  input_ = on_device == gradients_.end() ? unread_input() : *on_device;
  add_input_metadata(input_);
}

variable_list StartNode::apply(variable_list&&) {
  if (!replaced_.empty()) {
    const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
    const_cast<std::unordered_set<Node*>*>(nodes)->insert(replaced_.begin(), replaced_.end());
  }
  return std::move(gradients_);
}

std::string StartNode::name() const { return "pp_runtime::StartNode"; }

void StartNode::execute(Roots roots, bool keep_graph, std::vector<Node*> replaced) {
  const auto start = make_node<StartNode>(std::move(roots), std::move(replaced));
  torch::autograd::Engine::get_default_engine().execute({Edge(start, 0)}, {std::move(start->input_)}, keep_graph,
                                                        /*create_graph=*/false, /*accumulate_grad=*/true);
}

}  // namespace pp_runtime
