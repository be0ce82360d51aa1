#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pytypes.h>

#include <memory>
#include <vector>

namespace pp_runtime {

/// What stages and the executor ask of Python's objects. GIL held in all of these, but to drop a SharedPython.

/// A Python object that may be dropped without the GIL.
using SharedPython = std::shared_ptr<PyObject>;
SharedPython share_python(pybind11::object object);

/// Not null, and not None.
bool is_given(const pybind11::object& object);

/// Tensors to Python and back; an undefined tensor is a None. `tensor_in` wants what `is_tensor` says is one.
bool is_tensor(PyObject* object);
const at::Tensor& tensor_in(PyObject* object);
pybind11::object wrapped(const at::Tensor& tensor);
pybind11::object tuple_of(const std::vector<at::Tensor>& tensors);
pybind11::list list_of(const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> tensors_of(const pybind11::handle& sequence);

/// The tensors of a plain output: a tensor, or a tuple or list of tensors. False where it is something else.
bool plain_tensors(PyObject* output, std::vector<at::Tensor>& tensors);

/// Whether something among a stage's arguments may be, or hold, a leaf that requires a gradient. Either may be null.
bool any_may_require_grad(PyObject* args, PyObject* kwargs);

/// An output without its graph: what a user may keep.
pybind11::object without_graph(const pybind11::object& output);

}  // namespace pp_runtime
