#include "precompiled.h"

#include "execution/stage.h"

#include "execution/python_values.h"

#include <pybind11/cast.h>
#include <pybind11/gil.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace pp_runtime {

namespace {

/// Whether this is of a subclass that says itself what an operation does: its wrapper has no bytes of its own.
bool is_wrapper(const at::Tensor& tensor) {
  return tensor.defined() && tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

}  // namespace

Stage::Stage(int64_t index, bool is_first, bool is_last, StageCallbacks callbacks)
    : index_(index), is_first_(is_first), is_last_(is_last) {
  set_callbacks(std::move(callbacks));
}

void Stage::set_edges(std::vector<Edge> in_edges, std::vector<Edge> out_edges) {
  in_edges_ = std::move(in_edges);
  out_edges_ = std::move(out_edges);
}

void Stage::set_callbacks(StageCallbacks callbacks) {
  callbacks_ = std::move(callbacks);
  is_data_parallel_ = is_given(callbacks_.before_backward);
}

void Stage::begin_step(size_t microbatches, bool training, uint64_t step) {
  clear();
  microbatches_.resize(microbatches);
  training_ = training;
  step_ = step;
}

std::string Stage::name_of(size_t microbatch) const {
  return "stage " + std::to_string(index_) + ", microbatch " + std::to_string(microbatch);
}

Stage::Microbatch& Stage::at(size_t microbatch) {
  if (microbatch >= microbatches_.size()) {
    throw std::out_of_range(name_of(microbatch) + ": the step has " + std::to_string(microbatches_.size()) +
                            " microbatches");
  }
  return microbatches_[microbatch];
}

const Stage::Microbatch& Stage::at(size_t microbatch) const { return const_cast<Stage*>(this)->at(microbatch); }

Frame Stage::frame(size_t microbatch) const {
  return {.step = step_, .microbatch = static_cast<uint32_t>(microbatch), .training = training_ ? 1U : 0U};
}

void Stage::accept_activation(const Edge& edge, size_t microbatch, Message message) {
  Microbatch& state = at(microbatch);
  wrap(message);
  const size_t count = message.tensors.size();
  if (!edge.inputs.empty() && edge.inputs.size() != count) {
    throw std::runtime_error(name_of(microbatch) + ": " + std::to_string(count) + " tensors came from stage " +
                             std::to_string(edge.source) + " where the traced model has " +
                             std::to_string(edge.inputs.size()));
  }
  state.structure = std::move(message.structure);
  for (size_t i = 0; i < count; ++i) {
    const size_t position = edge.inputs.empty() ? i : static_cast<size_t>(edge.inputs[i]);
    if (state.inputs.size() <= position) {
      state.inputs.resize(position + 1);
    }
    Input& input = state.inputs[position];
    input.tensor = std::move(message.tensors[i]);
    if (training_ && message.requires_grad[i] != 0) {
      input.node = make_node<ReceiveNode>();
      torch::autograd::create_gradient_edge(input.tensor, input.node);
    }
  }
}

py::object Stage::received_args(Microbatch& state) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(state.inputs.size());
  for (Input& input : state.inputs) {
    // From here on the graph holds what it needs of the input; the runtime holds only the node that waits for its
    // gradient.
    tensors.push_back(std::move(input.tensor));
  }
  return build_args(tensors, std::exchange(state.structure, {}));
}

py::object Stage::build_args(const std::vector<at::Tensor>& tensors, std::string structure) {
  py::object args = tuple_of(tensors);
  return structure.empty() ? args : callbacks_.unflatten(args, py::bytes(structure));
}

py::object Stage::forward(size_t microbatch, PyObject* args, PyObject* kwargs) {
  Microbatch& state = at(microbatch);
  py::object arguments = is_first_ && args != nullptr ? py::reinterpret_borrow<py::object>(args) : received_args(state);
  auto output = py::reinterpret_steal<py::object>(PyObject_Call(callbacks_.forward.ptr(), arguments.ptr(), kwargs));
  if (!output) {
    throw py::error_already_set();
  }
  state.may_have_own_leaves = leaves_ && any_may_require_grad(is_first_ ? args : nullptr, kwargs);
  if (!is_last_) {
    keep_outputs(state, output);
  }
  return output;
}

void Stage::keep_outputs(Microbatch& state, const py::object& output) {
  std::vector<at::Tensor> tensors;
  state.output_structure.clear();
  state.output_wrappings.clear();
  if (!plain_tensors(output.ptr(), tensors) || !std::all_of(tensors.begin(), tensors.end(), can_travel)) {
    tensors.clear();
    const auto flat = callbacks_.flatten(output).cast<py::tuple>();
    if (!plain_tensors(flat[0].ptr(), tensors)) {
      throw std::runtime_error("flatten did not give a tuple of tensors");
    }
    state.output_structure = flat[1].cast<std::string>();
  }
  state.output_edges.assign(tensors.size(), {});
  state.output_requires_grad.assign(tensors.size(), 0);
  state.output_gradients.assign(tensors.size(), {});
  if (training_) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].requires_grad()) {
        state.output_edges[i] = torch::autograd::impl::gradient_edge(tensors[i]);
        state.output_requires_grad[i] = 1;
      }
    }
    look_for_leaves(state, state.output_edges);
  }
  Message message{.frame = {}, .tensors = std::move(tensors), .requires_grad = {}, .structure = {}};
  unwrap(message);
  state.outputs = std::move(message.tensors);
  state.output_wrappings = std::move(message.wrappings);
}

/// Puts what travels in the place of tensors that are wrappers. Takes the GIL where there are any.
void Stage::unwrap(Message& message) {
  if (!std::any_of(message.tensors.begin(), message.tensors.end(), is_wrapper)) {
    return;
  }
  py::gil_scoped_acquire gil;
  const auto unwrapped = callbacks_.unwrap(list_of(message.tensors)).cast<py::tuple>();
  message.tensors = tensors_of(unwrapped[0]);
  message.wrappings = unwrapped[1].cast<std::string>();
}

void Stage::wrap(Message& message) {
  if (message.wrappings.empty()) {
    return;
  }
  py::gil_scoped_acquire gil;
  message.tensors =
      tensors_of(callbacks_.wrap(list_of(message.tensors), py::bytes(std::exchange(message.wrappings, {}))));
}

/// The modules and the loss are the same for all microbatches, so that one graph shows their leaves; inputs are not.
void Stage::look_for_leaves(Microbatch& state, const torch::autograd::edge_list& edges) {
  if (leaves_ && (!has_looked_for_leaves_ || state.may_have_own_leaves)) {
    has_looked_for_leaves_ = true;
    leaves_->visit(edges);
  }
}

Message Stage::activation(const Edge& edge, size_t microbatch) const {
  const Microbatch& state = at(microbatch);
  const size_t count = edge.outputs.empty() ? state.outputs.size() : edge.outputs.size();
  Message message{.frame = frame(microbatch), .tensors = {}, .requires_grad = {}, .structure = {}};
  if (edge.outputs.empty()) {
    message.structure = state.output_structure;
  } else if (!state.output_wrappings.empty()) {
    throw std::runtime_error(
        name_of(microbatch) +
        ": a traced stage returned a DTensor, which its edges cannot carry: return its to_local()");
  }
  message.wrappings = state.output_wrappings;
  message.tensors.reserve(count);
  message.requires_grad.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t index = edge.outputs.empty() ? i : static_cast<size_t>(edge.outputs[i]);
    if (index >= state.outputs.size()) {
      throw std::runtime_error(name_of(microbatch) + ": the traced model uses output " + std::to_string(index) +
                               " but the module returned " + std::to_string(state.outputs.size()));
    }
    message.tensors.push_back(state.outputs[index].detach());
    message.requires_grad.push_back(state.output_requires_grad[index]);
  }
  return message;
}

void Stage::release_outputs(size_t microbatch) { std::vector<at::Tensor>().swap(at(microbatch).outputs); }

std::vector<at::Tensor> Stage::input_gradients(size_t microbatch) {
  Microbatch& state = at(microbatch);
  if (state.has_given_gradients) {
    return std::exchange(state.given_gradients, std::vector<at::Tensor>(state.inputs.size()));
  }
  std::vector<at::Tensor> gradients;
  for (Input& input : state.inputs) {
    gradients.push_back(input.take_gradient());
  }
  return gradients;
}

py::object Stage::take_inputs(size_t microbatch) {
  Microbatch& state = at(microbatch);
  std::vector<at::Tensor> tensors;
  for (Input& input : state.inputs) {
    if (!input.is_leaf) {
      input.tensor = input.tensor.detach();
      input.tensor.set_requires_grad(input.node != nullptr);
      input.node.reset();
      input.is_leaf = true;
      if (leaves_) {
        leaves_->exclude(input.tensor);
      }
    }
    tensors.push_back(input.tensor);
  }
  return build_args(tensors, state.structure);
}

void Stage::give_outputs(size_t microbatch, const py::object& output) { keep_outputs(at(microbatch), output); }

void Stage::drop_graph(size_t microbatch) {
  Microbatch& state = at(microbatch);
  state.output_edges.assign(state.output_edges.size(), {});
  state.loss = {};
  state.loss_gradient = at::Tensor();
}

std::vector<at::Tensor> Stage::take_output_gradients(size_t microbatch) {
  return std::exchange(at(microbatch).output_gradients, {});
}

void Stage::give_input_gradients(size_t microbatch, std::vector<at::Tensor> gradients) {
  Microbatch& state = at(microbatch);
  state.given_gradients = std::move(gradients);
  state.has_given_gradients = true;
}

void Stage::set_output_gradients(size_t microbatch, std::vector<at::Tensor> gradients) {
  Microbatch& state = at(microbatch);
  if (gradients.size() != state.output_edges.size()) {
    throw std::runtime_error(name_of(microbatch) + ": " + std::to_string(gradients.size()) +
                             " gradients were given for " + std::to_string(state.output_edges.size()) + " outputs");
  }
  state.output_gradients = std::move(gradients);
}

void Stage::clear() { std::vector<Microbatch>().swap(microbatches_); }

}  // namespace pp_runtime
