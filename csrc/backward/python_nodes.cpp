#include "precompiled.h"

#include "backward/python_nodes.h"

#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_function.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <typeinfo>
#include <vector>

namespace pp_runtime {

namespace py = pybind11;
using torch::autograd::edge_list;
using torch::autograd::Node;
using torch::autograd::variable_list;

namespace {

py::object helper(const char* name) {
  return py::module_::import("pp_runtime.running.stages.checkpointing").attr(name);
}

py::list listed(const variable_list& tensors) {
  py::list list;
  for (const at::Tensor& tensor : tensors) {
    list.append(tensor.defined() ? py::cast(tensor) : py::none());
  }
  return list;
}

variable_list tensors_of(const py::list& list) {
  variable_list tensors;
  for (const py::handle item : list) {
    tensors.push_back(item.is_none() ? at::Tensor() : item.cast<at::Tensor>());
  }
  return tensors;
}

/// Kept for ever: looking a module up takes as long as all else that a request needs.
const py::object& request_class() {
  static const auto* kRequest =
      new py::object(py::module_::import("pp_runtime.running.compiled.requests").attr("Request"));
  return *kRequest;
}

class PythonHalves final : public CompiledHalves {
 public:
  PythonHalves() : request_(request_class()()) { request_.attr("open")(); }

  ~PythonHalves() override {
    py::gil_scoped_acquire gil;
    request_ = py::object();
  }

  void close() override {
    py::gil_scoped_acquire gil;
    request_.attr("close")();
  }

  variable_list input_gradients(variable_list outputs, const std::vector<bool>& on_weight_side) override {
    py::gil_scoped_acquire gil;
    py::list list = listed(outputs);
    outputs.clear();
    return tensors_of(request_.attr("input_gradients")(std::move(list), on_weight_side));
  }

  variable_list weight_gradients() override {
    py::gil_scoped_acquire gil;
    return tensors_of(request_.attr("weight_gradients")());
  }

 private:
  py::object request_;
};

edge_list edges_of(const std::vector<at::Tensor>& tensors) {
  edge_list edges;
  for (const at::Tensor& tensor : tensors) {
    edges.push_back(tensor.requires_grad() ? torch::autograd::impl::gradient_edge(tensor) : torch::autograd::Edge());
  }
  return edges;
}

/// The Python object of a Python function's node: in every node's slot since torch 2.13, PyNode's own before.
template <class PythonNode = torch::autograd::PyNode>
PyObject* python_object(const Node& node) {
  const auto& python_node = static_cast<const PythonNode&>(node);
  if constexpr (requires { python_node.obj; }) {
    return python_node.obj;
  } else {
    return python_node.pyobj_slot()->load_pyobj();
  }
}

}  // namespace

bool is_python_function(const Node& node, const char* class_name) {
  // torch does not export PyNode's type information, so it is known by its name.
  if (std::strcmp(typeid(node).name(), "N5torch8autograd6PyNodeE") != 0) {
    return false;
  }
  // A type's name never changes, so it is read without the GIL.
  PyObject* object = python_object(node);
  return object != nullptr && std::strcmp(Py_TYPE(object)->tp_name, class_name) == 0;
}

bool is_reentrant_checkpoint(const Node& node) {
  // Only a namesake needs a closer look.
  if (!is_python_function(node, "CheckpointFunctionBackward")) {
    return false;
  }
  py::gil_scoped_acquire gil;
  return helper("is_reentrant_checkpoint")(py::handle(python_object(node))).cast<bool>();
}

bool saves_behind_hooks(Node& node) {
  py::gil_scoped_acquire gil;
  const auto object = py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node.getptr()));
  return helper("saves_behind_hooks")(object).cast<bool>();
}

std::shared_ptr<CompiledHalves> CompiledHalves::open() {
  py::gil_scoped_acquire gil;
  return std::make_shared<PythonHalves>();
}

Recomputed recompute(const Node& checkpoint) {
  py::gil_scoped_acquire gil;
  const py::handle context(python_object(checkpoint));
  const auto [outputs, inputs] =
      helper("recompute")(context).cast<std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>>>();
  return {edges_of(outputs), edges_of(inputs)};
}

}  // namespace pp_runtime
