#pragma once

#include <torch/csrc/autograd/function.h>

namespace pp_runtime {

/// A kind of node that is worth running twice: its input gradient and its weight gradient are separate products, each
/// about as large as the forward, and share no work. Matrix products and convolutions are; everything else is run whole
/// in I, because its weight gradients are small and come with, or cost less than, its input gradients.
struct WeightProduct {
  /// Whether the output with this index is one of the two products (a bias gradient is not).
  bool (*is_product)(size_t output);
  /// Whether saved tensors stand behind hooks.
  bool (*saves_behind_hooks)(const torch::autograd::Node& node);
  /// Replaces saved tensors that stand behind hooks by what the hooks give, so that a checkpoint's recomputation in I
  /// serves W too, and a hook of the user's runs once as in a full backward. Takes the GIL where a hook is Python's.
  void (*keep_unpacked)(torch::autograd::Node& node);
  /// Lets go of the saved tensors that only the input half reads.
  void (*release_input_half)(torch::autograd::Node& node, const torch::autograd::edge_list& weight_edges);
};

/// The node's kind, or null where it is to run whole.
const WeightProduct* weight_product_of(const torch::autograd::Node& node);

/// Whether the node only turns a weight around or changes its dtype, on the way from a product to the leaf.
bool is_transposition_or_cast(const torch::autograd::Node& node);

}  // namespace pp_runtime
