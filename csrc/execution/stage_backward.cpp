#include "precompiled.h"

#include "execution/stage.h"

#include "backward/full_backward.h"
#include "execution/python_values.h"

#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <pybind11/cast.h>
#include <pybind11/gil.h>

#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace pp_runtime {

namespace {

/// Calls `before`, the work, and `after` (also where the work throws), as a context manager would.
template <typename Work>
void in_context(const StageCallbacks& callbacks, bool last, const std::vector<at::Tensor>& graph, const Work& work) {
  {
    py::gil_scoped_acquire gil;
    callbacks.before_backward(last, list_of(graph));
  }
  const auto leave = [&] {
    py::gil_scoped_acquire gil;
    const py::error_scope raised;  // what the work raised may be set already
    callbacks.after_backward(last);
  };
  try {
    work();
  } catch (...) {
    leave();
    throw;
  }
  leave();
}

}  // namespace

void Stage::set_loss(size_t microbatch, const at::Tensor& loss) {
  if (!training_) {
    return;
  }
  if (!loss.requires_grad()) {
    throw std::runtime_error("the loss of microbatch " + std::to_string(microbatch) +
                             " does not depend on anything that requires a gradient: let loss_fn compute it from the "
                             "output by differentiable operations, or call eval()");
  }
  if (loss.numel() != 1) {
    throw std::runtime_error("the loss of microbatch " + std::to_string(microbatch) + " has " +
                             std::to_string(loss.numel()) + " elements: let loss_fn return a scalar");
  }
  Microbatch& state = at(microbatch);
  state.loss = torch::autograd::impl::gradient_edge(loss);
  state.loss_gradient = at::ones_like(loss);
  look_for_leaves(state, {state.loss});
}

void Stage::accept_gradient(const Edge& edge, size_t microbatch, Message message) {
  Microbatch& state = at(microbatch);
  wrap(message);
  const size_t expected = edge.outputs.empty() ? state.output_edges.size() : edge.outputs.size();
  if (message.tensors.size() != expected) {
    throw std::runtime_error(name_of(microbatch) + ": " + std::to_string(message.tensors.size()) +
                             " gradients came from stage " + std::to_string(edge.destination) + " for " +
                             std::to_string(expected) + " outputs");
  }
  for (size_t i = 0; i < expected; ++i) {
    if (!message.tensors[i].defined()) {
      continue;
    }
    const size_t index = edge.outputs.empty() ? i : static_cast<size_t>(edge.outputs[i]);
    at::Tensor& gradient = state.output_gradients[index];
    gradient = gradient.defined() ? at::add(gradient, message.tensors[i]) : std::move(message.tensors[i]);
  }
}

Roots Stage::take_roots(Microbatch& state) {
  Roots roots;
  if (state.loss.is_valid()) {
    roots.edges.push_back(std::exchange(state.loss, {}));
    roots.grads.push_back(std::move(state.loss_gradient));
  }
  for (size_t i = 0; i < state.output_gradients.size(); ++i) {
    if (state.output_gradients[i].defined() && state.output_edges[i].is_valid()) {
      roots.edges.push_back(std::move(state.output_edges[i]));
      roots.grads.push_back(std::move(state.output_gradients[i]));
    }
  }
  state.output_edges.clear();
  state.output_gradients.clear();
  state.outputs.clear();
  return roots;
}

void Stage::run_backward(Microbatch& state, BackwardKind kind) {
  if (kind == BackwardKind::kWeight) {
    if (state.weight_half) {
      std::exchange(state.weight_half, nullptr)->run();
    }
    return;
  }
  Roots roots = take_roots(state);
  if (kind == BackwardKind::kFull) {
    if (!roots.edges.empty()) {
      full_backward(std::move(roots));
    }
    return;
  }
  std::vector<NodePointer> input_nodes;
  for (const Input& input : state.inputs) {
    if (input.node) {
      input_nodes.emplace_back(input.node);
    } else if (input.is_leaf && input.tensor.requires_grad()) {
      input_nodes.emplace_back(torch::autograd::impl::grad_accumulator(input.tensor));
    }
  }
  if (!roots.edges.empty()) {
    state.weight_half = input_backward(std::move(roots), input_nodes);
  }
}

void Stage::backward(size_t microbatch, BackwardKind kind, bool last) {
  Microbatch& state = at(microbatch);
  // As in torch, a dw_builder's stage leaves its weight gradients out of autograd, so I is the whole engine call.
  const bool builds_weights = is_given(callbacks_.dw_builder);
  const BackwardKind engine_kind = builds_weights && kind == BackwardKind::kInput ? BackwardKind::kFull : kind;
  const auto work = [&] { run_backward(state, engine_kind); };
  if (is_data_parallel_) {
    in_context(callbacks_, last, last ? graph_of(state, kind) : std::vector<at::Tensor>(), work);
  } else {
    work();
  }
  if (builds_weights) {
    py::gil_scoped_acquire gil;
    if (kind == BackwardKind::kFull) {
      callbacks_.dw_builder()();
    } else if (kind == BackwardKind::kInput) {
      state.weight_runner = share_python(callbacks_.dw_builder());
    } else if (state.weight_runner) {
      py::reinterpret_borrow<py::object>(std::exchange(state.weight_runner, nullptr).get())();
    }
  }
}

/// Tensors without values whose graph is the one that the backward will run: a DDP that looks for unused parameters
/// looks behind its outputs.
std::vector<at::Tensor> Stage::graph_of(const Microbatch& state, BackwardKind kind) const {
  torch::autograd::edge_list edges;
  if (kind == BackwardKind::kWeight) {
    if (state.weight_half) {
      edges = state.weight_half->edges();
    }
  } else {
    edges = state.output_edges;
    edges.push_back(state.loss);
  }
  std::vector<at::Tensor> tensors;
  for (torch::autograd::Edge& edge : edges) {
    if (edge.is_valid()) {
      torch::autograd::impl::set_gradient_edge(tensors.emplace_back(at::empty({0})), std::move(edge));
    }
  }
  return tensors;
}

at::Tensor Stage::Input::take_gradient() {
  if (is_leaf) {
    return std::exchange(tensor.mutable_grad(), at::Tensor());
  }
  return node ? std::exchange(node, nullptr)->take_gradient() : at::Tensor();
}

Message Stage::input_gradients(const Edge& edge, size_t microbatch) {
  Microbatch& state = at(microbatch);
  if (state.has_given_gradients && state.given_gradients.size() != state.inputs.size()) {
    throw std::runtime_error(name_of(microbatch) + ": " + std::to_string(state.given_gradients.size()) +
                             " input gradients were given for " + std::to_string(state.inputs.size()) + " inputs");
  }
  const size_t count = edge.inputs.empty() ? state.inputs.size() : edge.inputs.size();
  Message message{.frame = frame(microbatch), .tensors = {}, .requires_grad = {}, .structure = {}};
  message.tensors.reserve(count);
  message.requires_grad.assign(count, 0);
  for (size_t i = 0; i < count; ++i) {
    const size_t position = edge.inputs.empty() ? i : static_cast<size_t>(edge.inputs[i]);
    message.tensors.push_back(state.has_given_gradients ? std::move(state.given_gradients[position])
                                                        : state.inputs[position].take_gradient());
  }
  unwrap(message);
  return message;
}

}  // namespace pp_runtime
