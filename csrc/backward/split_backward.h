#pragma once

#include "backward/graph.h"

#include <memory>
#include <vector>

namespace pp_runtime {

class HalfNode;

/// W: the weight gradients that an input backward left to be computed later.
///
/// Owns the frontier nodes with the gradients that reached them, the weight side of the graph, and nothing else.
/// Used by one thread at a time; the caller does not hold the GIL.
class WeightHalf {
 public:
  WeightHalf(std::vector<c10::intrusive_ptr<HalfNode>> halves, Roots roots);
  WeightHalf(const WeightHalf&) = delete;
  WeightHalf& operator=(const WeightHalf&) = delete;
  ~WeightHalf();

  /// One engine call that accumulates into the leaves, so their hooks fire. A second run is an error.
  void run(bool keep_graph = false);

  /// Takes over what another half has to do.
  void absorb(WeightHalf&& other);

  /// Where its graph begins.
  torch::autograd::edge_list edges() const;

 private:
  std::vector<c10::intrusive_ptr<HalfNode>> halves_;
  Roots roots_;
  bool has_run_ = false;
};

/// I: one engine call from the roots to the input nodes, which are run (a ReceiveNode stores its gradient). An input
/// node has no next edges. Without input nodes nothing runs here, and W is the full backward.
///
/// The graph is rewired on the way (see graph_splitter.h), so it serves this one backward.
std::unique_ptr<WeightHalf> input_backward(Roots roots, const std::vector<NodePointer>& input_nodes);

struct InputGradients {
  torch::autograd::variable_list gradients;  // one an input edge, undefined where none came
  std::unique_ptr<WeightHalf> weight_half;
};

/// The same where an input is any edge of the graph: gradients are caught in front of it, nothing behind it runs.
InputGradients captured_input_backward(Roots roots, const torch::autograd::edge_list& inputs);

}  // namespace pp_runtime
