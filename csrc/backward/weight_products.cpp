#include "precompiled.h"

#include "backward/weight_products.h"

#include <ATen/SavedTensorHooks.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/generated/Functions.h>

#include <typeindex>
#include <typeinfo>
#include <unordered_map>

namespace pp_runtime {

namespace generated = torch::autograd::generated;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::SavedVariable;

namespace {

void keep_unpacked(SavedVariable& saved, Node& node) {
  if (!saved.has_hooks()) {
    return;
  }
  const at::Tensor unpacked = saved.unpack(node.getptr());
  // Saving anew would pack the tensor again where the caller's thread has default hooks on.
  const at::impl::SavedTensorDefaultHooksTLS hooks = at::SavedTensorDefaultHooks::get_tls_state();
  at::SavedTensorDefaultHooks::set_tls_state({});
  saved = SavedVariable(unpacked.defined() ? unpacked.detach() : unpacked, /*is_output=*/false);
  at::SavedTensorDefaultHooks::set_tls_state(hooks);
}

bool is_valid(const edge_list& edges, size_t index) { return index < edges.size() && edges[index].is_valid(); }

/// A product of two factors: the gradient of one reads only the other.
template <class T, size_t kFirst, size_t kSecond, SavedVariable T::* first, SavedVariable T::* second>
constexpr WeightProduct product_of_factors() {
  return {
      [](size_t output) { return output == kFirst || output == kSecond; },
      [](const Node& node) {
        const T& product = static_cast<const T&>(node);
        return (product.*first).has_hooks() || (product.*second).has_hooks();
      },
      [](Node& node) {
        keep_unpacked(static_cast<T&>(node).*first, node);
        keep_unpacked(static_cast<T&>(node).*second, node);
      },
      [](Node& node, const edge_list& weight_edges) {
        if (!is_valid(weight_edges, kFirst)) {
          static_cast<T&>(node).*second = SavedVariable();
        }
        if (!is_valid(weight_edges, kSecond)) {
          static_cast<T&>(node).*first = SavedVariable();
        }
      },
  };
}

/// A layer whose backward takes input and weight together with a mask of what to compute.
template <class T>
constexpr WeightProduct layer() {
  return {
      [](size_t output) { return output <= 1; },
      [](const Node& node) {
        const T& layer = static_cast<const T&>(node);
        return layer.input_.has_hooks() || layer.weight_.has_hooks();
      },
      [](Node& node) {
        keep_unpacked(static_cast<T&>(node).input_, node);
        keep_unpacked(static_cast<T&>(node).weight_, node);
      },
      [](Node&, const edge_list&) {},
  };
}

/// As a product of factors; the offsets of the groups are read by both halves.
constexpr WeightProduct grouped_product() {
  using generated::GroupedMmBackward0;
  WeightProduct product =
      product_of_factors<GroupedMmBackward0, 0, 1, &GroupedMmBackward0::self_, &GroupedMmBackward0::mat2_>();
  product.keep_unpacked = [](Node& node) {
    auto& grouped = static_cast<GroupedMmBackward0&>(node);
    for (SavedVariable* saved : {&grouped.self_, &grouped.mat2_, &grouped.offs_}) {
      keep_unpacked(*saved, node);
    }
  };
  return product;
}

using generated::AddbmmBackward0;
using generated::AddmmBackward0;
using generated::BaddbmmBackward0;
using generated::BmmBackward0;
using generated::MmBackward0;

constexpr WeightProduct kMm = product_of_factors<MmBackward0, 0, 1, &MmBackward0::self_, &MmBackward0::mat2_>();
constexpr WeightProduct kBmm = product_of_factors<BmmBackward0, 0, 1, &BmmBackward0::self_, &BmmBackward0::mat2_>();
constexpr WeightProduct kAddmm =
    product_of_factors<AddmmBackward0, 1, 2, &AddmmBackward0::mat1_, &AddmmBackward0::mat2_>();
constexpr WeightProduct kBaddbmm =
    product_of_factors<BaddbmmBackward0, 1, 2, &BaddbmmBackward0::batch1_, &BaddbmmBackward0::batch2_>();
constexpr WeightProduct kAddbmm =
    product_of_factors<AddbmmBackward0, 1, 2, &AddbmmBackward0::batch1_, &AddbmmBackward0::batch2_>();
constexpr WeightProduct kGroupedMm = grouped_product();
constexpr WeightProduct kConvolution = layer<generated::ConvolutionBackward0>();
constexpr WeightProduct kConvolutionOverrideable = layer<generated::ConvolutionOverrideableBackward0>();
constexpr WeightProduct kLinear = layer<generated::LinearBackward0>();

}  // namespace

const WeightProduct* weight_product_of(const Node& node) {
  static const std::unordered_map<std::type_index, const WeightProduct*> kProducts{
      {typeid(MmBackward0), &kMm},
      {typeid(BmmBackward0), &kBmm},
      {typeid(AddmmBackward0), &kAddmm},
      {typeid(BaddbmmBackward0), &kBaddbmm},
      {typeid(AddbmmBackward0), &kAddbmm},
      {typeid(generated::GroupedMmBackward0), &kGroupedMm},
      {typeid(generated::ConvolutionBackward0), &kConvolution},
      {typeid(generated::ConvolutionOverrideableBackward0), &kConvolutionOverrideable},
      {typeid(generated::LinearBackward0), &kLinear},
  };
  // A type_index hashes the type's name; its address, which is asked for every node, is quicker.
  thread_local ska::flat_hash_map<const std::type_info*, const WeightProduct*> known;
  const auto [entry, is_new] = known.emplace(&typeid(node), nullptr);
  if (is_new) {
    const auto found = kProducts.find(typeid(node));
    entry->second = found == kProducts.end() ? nullptr : found->second;
  }
  return entry->second;
}

bool is_transposition_or_cast(const Node& node) {
  return typeid(node) == typeid(generated::TBackward0) || typeid(node) == typeid(generated::ToCopyBackward0);
}

}  // namespace pp_runtime
