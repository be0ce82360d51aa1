#include "stage.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace pp_runtime {

namespace {

std::string name_of(int64_t stage, size_t microbatch) {
  return "stage " + std::to_string(stage) + ", microbatch " + std::to_string(microbatch);
}

/// The tensors of a plain output: a tensor, or a tuple or list of tensors. False where it is something else.
bool plain_tensors(PyObject* output, std::vector<at::Tensor>& tensors) {
  if (THPVariable_Check(output)) {
    tensors.push_back(THPVariable_Unpack(output));
    return true;
  }
  // A named tuple is a tuple.
  if (!PyTuple_Check(output) && !PyList_CheckExact(output)) {
    return false;
  }
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(output);
  tensors.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(output, i);
    if (!THPVariable_Check(item)) {
      tensors.clear();
      return false;
    }
    tensors.push_back(THPVariable_Unpack(item));
  }
  return true;
}

py::object tuple_of(const std::vector<at::Tensor>& tensors) {
  py::tuple args(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    PyTuple_SET_ITEM(args.ptr(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(tensors[i]));
  }
  return args;
}

/// None for a tensor that is not defined.
py::list list_of(const std::vector<at::Tensor>& tensors) {
  py::list list;
  for (const at::Tensor& tensor : tensors) {
    list.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)));
  }
  return list;
}

std::vector<at::Tensor> tensors_of(const py::handle& sequence) {
  std::vector<at::Tensor> tensors;
  for (const py::handle item : sequence) {
    tensors.push_back(item.is_none() ? at::Tensor() : THPVariable_Unpack(item.ptr()));
  }
  return tensors;
}

/// Whether this is of a subclass that says itself what an operation does: its wrapper has no bytes of its own.
bool is_wrapper(const at::Tensor& tensor) {
  return tensor.defined() && tensor.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::Python);
}

/// Whether something that a program gives to a stage may be, or hold, a leaf that requires a gradient.
bool may_require_grad(PyObject* value) {
  if (THPVariable_Check(value)) {
    return THPVariable_Unpack(value).requires_grad();
  }
  return !(value == Py_None || PyLong_Check(value) || PyFloat_Check(value) || PyUnicode_Check(value));
}

bool any_may_require_grad(PyObject* args, PyObject* kwargs) {
  if (args != nullptr && PyTuple_Check(args)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
      if (may_require_grad(PyTuple_GET_ITEM(args, i))) {
        return true;
      }
    }
  }
  if (kwargs != nullptr && PyDict_Check(kwargs)) {
    PyObject* value = nullptr;
    for (Py_ssize_t place = 0; PyDict_Next(kwargs, &place, nullptr, &value) != 0;) {
      if (may_require_grad(value)) {
        return true;
      }
    }
  }
  return false;
}

bool is_given(const py::object& object) { return object && !object.is_none(); }

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

SharedPython share_python(py::object object) {
  return {object.release().ptr(), [](PyObject* pointer) {
            py::gil_scoped_acquire gil;
            Py_XDECREF(pointer);
          }};
}

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

Stage::Microbatch& Stage::at(size_t microbatch) {
  if (microbatch >= microbatches_.size()) {
    throw std::out_of_range(name_of(index_, microbatch) + ": the step has " + std::to_string(microbatches_.size()) +
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
    throw std::runtime_error(name_of(index_, microbatch) + ": " + std::to_string(count) + " tensors came from stage " +
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
      input.node = c10::make_intrusive<ReceiveNode>();
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
        name_of(index_, microbatch) +
        ": a traced stage returned a DTensor, which its edges cannot carry: return its to_local()");
  }
  message.wrappings = state.output_wrappings;
  message.tensors.reserve(count);
  message.requires_grad.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t index = edge.outputs.empty() ? i : static_cast<size_t>(edge.outputs[i]);
    if (index >= state.outputs.size()) {
      throw std::runtime_error(name_of(index_, microbatch) + ": the traced model uses output " + std::to_string(index) +
                               " but the module returned " + std::to_string(state.outputs.size()));
    }
    message.tensors.push_back(state.outputs[index].detach());
    message.requires_grad.push_back(state.output_requires_grad[index]);
  }
  return message;
}

void Stage::release_outputs(size_t microbatch) { std::vector<at::Tensor>().swap(at(microbatch).outputs); }

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
    throw std::runtime_error(name_of(index_, microbatch) + ": " + std::to_string(message.tensors.size()) +
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
    throw std::runtime_error(name_of(index_, microbatch) + ": " + std::to_string(state.given_gradients.size()) +
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
    throw std::runtime_error(name_of(index_, microbatch) + ": " + std::to_string(gradients.size()) +
                             " gradients were given for " + std::to_string(state.output_edges.size()) + " outputs");
  }
  state.output_gradients = std::move(gradients);
}

void Stage::clear() { std::vector<Microbatch>().swap(microbatches_); }

}  // namespace pp_runtime
