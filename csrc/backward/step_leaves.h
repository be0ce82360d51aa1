#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/autograd/function.h>

#include <utility>
#include <vector>

namespace pp_runtime {

/// The leaves that a step's gradients reach besides the parameters of its modules: inputs that require gradients,
/// parameters of a loss function or of modules that nobody registered.
///
/// What each held as gradient before the step is set aside when its graph is first seen, so that what the step adds can
/// be told from it. Shared by the stages of a rank, used by the thread that runs the step.
class StepLeaves {
 public:
  /// `known` are the leaves whose gradients somebody else set aside.
  explicit StepLeaves(const std::vector<at::Tensor>& known);

  /// A leaf that stands for what came from another stage; its gradient goes there.
  void exclude(const at::Tensor& leaf);

  /// Walks the graph behind the edges.
  void visit(const torch::autograd::edge_list& edges);

  /// The leaves found, each with the gradient it held before; undefined where it held none.
  std::vector<std::pair<at::Tensor, at::Tensor>> take() { return std::exchange(found_, {}); }

 private:
  void know(const at::Tensor& leaf);
  void find(torch::autograd::Node& node);

  // The weak pointers keep the addresses from being used again.
  ska::flat_hash_map<c10::TensorImpl*, c10::weak_intrusive_ptr<c10::TensorImpl>> known_;
  ska::flat_hash_set<torch::autograd::Node*> seen_;
  std::vector<torch::autograd::Node*> to_visit_;
  std::vector<std::pair<at::Tensor, at::Tensor>> found_;
};

}  // namespace pp_runtime
