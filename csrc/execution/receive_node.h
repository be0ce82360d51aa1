#pragma once

#include <ATen/ops/add.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <utility>

namespace pp_runtime {

/// The gradient function of a tensor that came in from another stage: it collects the gradient that goes back.
///
/// It has no next edges, as a leaf's node has none, but the tensor in front of it is not a leaf: in-place operations on
/// it are legal, and hooks put on it die with it. Owned by the autograd graph and by the stage's record of the
/// microbatch; `apply` runs on the engine's thread, `take_gradient` on the executor's after the engine call is over.
struct ReceiveNode : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    if (!gradients.empty() && gradients[0].defined()) {
      gradient_ = gradient_.defined() ? at::add(gradient_, gradients[0]) : std::move(gradients[0]);
    }
    return {};
  }

  std::string name() const override { return "pp_runtime::ReceiveNode"; }

  /// The gradient collected since the last call; undefined where none came.
  at::Tensor take_gradient() { return std::exchange(gradient_, at::Tensor()); }

 private:
  at::Tensor gradient_;
};

}  // namespace pp_runtime
