#pragma once

#include "backward/graph.h"

#include <cstdint>
#include <string>
#include <vector>

namespace pp_runtime {

class LeafPaths;
struct WeightProduct;

/// What the engine does before a node runs, for a node that is run in another's place: its hooks, in the engine's
/// order.
torch::autograd::variable_list run_hooks_before(torch::autograd::Node& node, torch::autograd::variable_list gradients);

/// A node that takes part in I and again in W, where it is a root. Owned by the graph during I, by the WeightHalf
/// after.
///
/// In both halves it stands at the place of the node it halves (same sequence number), so the engine sums gradients in
/// the order of a full backward. Everything runs on the engine's threads but `begin_weight_half`, which runs between
/// the calls.
class HalfNode : public torch::autograd::Node {
 public:
  using Node::Node;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override = 0;
  /// Turns from I to W: next edges become the weight-side ones, and what only I needed is let go.
  virtual void begin_weight_half() = 0;
  /// In W, makes `next` wait for this node. The engine would run them in this order anyway, but through a queue that
  /// holds all of them at once, whose every step then takes longer the deeper the stage.
  void run_before(const Owned<HalfNode>& next);
  /// In W, makes this node take its gradients along the free paths itself. True if that is all of them: then the engine
  /// has nothing to do with this node.
  bool shorten(const LeafPaths& paths);

 protected:
  /// What the node returns in W for these gradients: those whose paths are its own it accumulates itself, and the half
  /// that runs next gets nothing.
  torch::autograd::variable_list hand_on(torch::autograd::variable_list gradients) const;

 private:
  torch::autograd::edge_list own_paths_;  // where next_edges has an invalid one
};

/// Replaces a node in the graph, because the engine would release the node after I, and runs it. In I its edges are the
/// input-side ones of the node, in W the weight-side ones; those of the other side are invalid.
class StandInNode : public HalfNode {
 public:
  StandInNode(NodePointer whole, torch::autograd::edge_list input_edges, torch::autograd::edge_list weight_edges);

  std::string name() const override;
  void begin_weight_half() override;

  bool has_hooks() const;

 protected:
  torch::autograd::Node& whole() const { return *whole_; }
  bool in_weight_half() const { return in_weight_half_; }
  /// In I.
  const torch::autograd::edge_list& weight_edges() const { return weight_edges_; }

 private:
  const NodePointer whole_;
  torch::autograd::edge_list weight_edges_;
  bool in_weight_half_ = false;
};

/// Runs a node of which each half is a product of its own (matrix products, convolutions) twice: for the input side
/// in I, for the weight side in W.
///
///        parent                      parent                      W's start
///          |                            |                            |
///        Addmm        I:  SplitNode(Addmm -> x)        W:  SplitNode(Addmm -> w)
///        /    \                  |                                       |
///       x      w                 x                                       w
class SplitNode final : public StandInNode {
 public:
  SplitNode(NodePointer whole, torch::autograd::edge_list input_edges, torch::autograd::edge_list weight_edges,
            const WeightProduct& product);

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override;
  void release_variables() override;
  void begin_weight_half() override;

 private:
  const WeightProduct& product_;
  torch::autograd::variable_list gradients_;
};

/// Keeps the weight-side gradients of a node that runs whole in I, and hands them on in W.
///
///        parent                      parent              W's start
///          |                            |                    |
///      LayerNorm          I:       LayerNorm       W:    KeepNode
///        /    \                     /    \                   |
///       x      w                   x   KeepNode              w
class KeepNode final : public HalfNode {
 public:
  KeepNode(uint64_t sequence_nr, torch::autograd::edge_list weight_edges);

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override;
  void begin_weight_half() override;
  std::string name() const override;

 private:
  torch::autograd::edge_list weight_edges_;
  torch::autograd::variable_list gradients_;
  bool in_weight_half_ = false;
};

/// In W, runs HalfNodes that take all their gradients to the leaves themselves.
class HalvesNode final : public torch::autograd::Node {
 public:
  explicit HalvesNode(std::vector<Owned<HalfNode>> halves);

  torch::autograd::variable_list apply(torch::autograd::variable_list&& unused) override;
  std::string name() const override;

 private:
  std::vector<Owned<HalfNode>> halves_;
};

/// Catches the gradients in front of an input's node, so that nothing behind the input runs; the tensor's own hooks do.
class CaptureNode final : public torch::autograd::Node {
 public:
  explicit CaptureNode(NodePointer captured);

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override;
  std::string name() const override;

  at::Tensor gradient(size_t input_nr) const;
  /// Drops the gradients: what W needs may hold this node, by the graph of a tensor that it saved.
  void let_go() { gradients_.clear(); }

 private:
  const NodePointer captured_;
  torch::autograd::variable_list gradients_;
};

/// The one root of an engine call: hands every real root its gradient, an undefined one to a HalfNode in W.
class StartNode final : public torch::autograd::Node {
 public:
  /// `replaced` are nodes with hooks that SplitNodes run: they are announced to the running graph task, because
  /// torch.autograd.graph.register_multi_grad_hook asks it which of its nodes will run.
  explicit StartNode(Roots roots, std::vector<torch::autograd::Node*> replaced = {});

  torch::autograd::variable_list apply(torch::autograd::variable_list&& unused) override;
  std::string name() const override;

  /// Runs the engine from here, once.
  static void execute(Roots roots, bool keep_graph, std::vector<torch::autograd::Node*> replaced = {});

 private:
  at::Tensor input_;  // the engine wants one; nobody reads it
  torch::autograd::variable_list gradients_;
  std::vector<torch::autograd::Node*> replaced_;
};

}  // namespace pp_runtime
