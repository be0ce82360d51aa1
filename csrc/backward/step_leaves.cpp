#include "precompiled.h"

#include "backward/step_leaves.h"

#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <typeinfo>

namespace pp_runtime {

using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::edge_list;
using torch::autograd::Node;

StepLeaves::StepLeaves(const std::vector<at::Tensor>& known) {
  for (const at::Tensor& leaf : known) {
    know(leaf);
  }
}

void StepLeaves::exclude(const at::Tensor& leaf) { know(leaf); }

void StepLeaves::know(const at::Tensor& leaf) {
  known_.emplace(leaf.unsafeGetTensorImpl(), c10::weak_intrusive_ptr<c10::TensorImpl>(leaf.getIntrusivePtr()));
}

void StepLeaves::visit(const edge_list& edges) {
  const auto arrive = [this](const edge_list& from) {
    for (const Edge& edge : from) {
      if (edge.is_valid() && seen_.insert(edge.function.get()).second) {
        to_visit_.push_back(edge.function.get());
      }
    }
  };
  seen_.clear();
  arrive(edges);
  while (!to_visit_.empty()) {
    Node* node = to_visit_.back();
    to_visit_.pop_back();
    if (node->next_edges().empty()) {
      find(*node);
    } else {
      arrive(node->next_edges());
    }
  }
}

void StepLeaves::find(Node& node) {
  if (typeid(node) != typeid(AccumulateGrad)) {
    return;
  }
  at::Tensor& leaf = static_cast<AccumulateGrad&>(node).variable;
  if (!leaf.defined() || known_.count(leaf.unsafeGetTensorImpl()) != 0) {
    return;
  }
  know(leaf);
  found_.emplace_back(leaf, std::exchange(leaf.mutable_grad(), at::Tensor()));
}

}  // namespace pp_runtime
