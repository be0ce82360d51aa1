#pragma once

#include "backward/graph.h"

#include <c10/util/flat_hash_map.h>

#include <vector>

namespace pp_runtime {

/// Finds the edges of W that lead to a leaf over nothing but a transposition or a cast.
///
/// The engine takes longer to look after such a node than the node takes, so a HalfNode follows these edges itself.
/// It may where the result is the engine's: on a CPU, where no second gradient arrives at the path (the engine would
/// sum before it accumulates), and where no node of it has a hook that the engine would call.
class LeafPaths {
 public:
  /// Counts what these edges reach; every edge that W begins with must have been counted before `is_free` is asked.
  void count(const torch::autograd::edge_list& edges);

  bool is_free(const torch::autograd::Edge& edge) const;

  /// Takes what a node made along its free edges into their leaves; other edges are not valid here.
  static void follow(const torch::autograd::Node& node, const torch::autograd::edge_list& edges,
                     torch::autograd::variable_list& gradients);

 private:
  ska::flat_hash_map<torch::autograd::Node*, int> arrivals_;
  std::vector<torch::autograd::Node*> to_visit_;
};

}  // namespace pp_runtime
