#pragma once

#include "backward/half_nodes.h"
#include "backward/recompute_node.h"

#include <c10/util/flat_hash_map.h>

#include <utility>
#include <vector>

namespace pp_runtime {

/// Rewires one microbatch's graph so that an engine call from its roots runs the input side only, and a second one from
/// the HalfNodes runs the rest.
///
/// A node is on the *input side* when a stage input can be reached from it. A *frontier* node is on the input side and
/// has a child that is not; it is run by a SplitNode, or whole with a KeepNode before its weight-side children. One
/// depth-first walk in which a node is settled after its children: linear in nodes and edges, no recursion. Lives for
/// one input backward.
class GraphSplitter {
 public:
  /// Gradients that reach `input` go to `stand_in`, which may be the input's node itself; the walk ends there.
  void add_input(torch::autograd::Node* input, torch::autograd::Node* stand_in);

  /// Walks and rewires everything that the node reaches.
  void visit(torch::autograd::Node* root);

  /// Whether the edge leads to a stage input; if so it is redirected to the node that stands for its own.
  bool redirect(torch::autograd::Edge& edge) const;

  std::vector<Owned<HalfNode>> take_halves() { return std::move(halves_); }
  /// Nodes with hooks that StandInNodes replaced in the graph.
  std::vector<torch::autograd::Node*> take_replaced() { return std::move(replaced_); }

  std::vector<Owned<RecomputeNode>> take_recomputes() { return std::move(recomputes_); }

 private:
  struct Place {
    bool on_input_side = false;
    torch::autograd::Node* stand_in = nullptr;  // what replaces the node in the graph; borrowed
  };
  struct Step {
    torch::autograd::Node* node;
    size_t next_child;
  };

  bool enter(torch::autograd::Node* node);
  void settle(torch::autograd::Node& node);
  bool must_run_in_input_half(torch::autograd::Node& node) const;
  /// Splits a frontier node; returns what replaces it in the graph, null where it stays.
  torch::autograd::Node* halve(torch::autograd::Node& node);
  /// Has a StandInNode of that kind run the node, and returns it.
  template <class StandIn, class... Arguments>
  torch::autograd::Node* stand_in(torch::autograd::Node& node, Arguments&&... arguments);
  void keep(torch::autograd::Node& node);

  ska::flat_hash_map<torch::autograd::Node*, Place> places_;
  std::vector<Step> path_;
  std::vector<char> on_weight_side_;  // of each edge of the node being settled
  std::vector<Owned<HalfNode>> halves_;
  std::vector<Owned<RecomputeNode>> recomputes_;
  std::vector<torch::autograd::Node*> replaced_;
  bool inside_checkpoint_ = false;  // some product's saved tensors stand behind hooks
};

}  // namespace pp_runtime
