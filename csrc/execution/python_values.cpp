#include "precompiled.h"

#include "execution/python_values.h"

#include <torch/csrc/autograd/python_variable.h>

#include <utility>

namespace py = pybind11;

namespace pp_runtime {

namespace {

/// Where Python takes apart outputs that are not of Python's own containers.
constexpr const char* kPayloadModule = "pp_runtime.running.values.payload";

/// Whether something that a program gives to a stage may be, or hold, a leaf that requires a gradient.
bool may_require_grad(PyObject* value) {
  if (THPVariable_Check(value)) {
    return THPVariable_Unpack(value).requires_grad();
  }
  return !(value == Py_None || PyLong_Check(value) || PyFloat_Check(value) || PyUnicode_Check(value));
}

}  // namespace

SharedPython share_python(py::object object) {
  return {object.release().ptr(), [](PyObject* pointer) {
            py::gil_scoped_acquire gil;
            Py_XDECREF(pointer);
          }};
}

bool is_given(const py::object& object) { return object && !object.is_none(); }

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }

const at::Tensor& tensor_in(PyObject* object) { return THPVariable_Unpack(object); }

py::object wrapped(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

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

py::list list_of(const std::vector<at::Tensor>& tensors) {
  py::list list;
  for (const at::Tensor& tensor : tensors) {
    list.append(wrapped(tensor));
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

py::object without_graph(const py::object& output) {
  if (THPVariable_Check(output.ptr())) {
    return wrapped(tensor_in(output.ptr()).detach());
  }
  if (PyTuple_CheckExact(output.ptr()) || PyList_CheckExact(output.ptr())) {
    py::list items;
    for (const py::handle item : output) {
      items.append(without_graph(py::reinterpret_borrow<py::object>(item)));
    }
    return PyTuple_CheckExact(output.ptr()) ? py::object(py::tuple(items)) : py::object(items);
  }
  if (PyDict_CheckExact(output.ptr())) {
    py::dict items;
    for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(output)) {
      items[key] = without_graph(py::reinterpret_borrow<py::object>(value));
    }
    return items;
  }
  const bool is_plain =
      output.is_none() || PyLong_Check(output.ptr()) || PyFloat_Check(output.ptr()) || PyUnicode_Check(output.ptr());
  return is_plain ? output : py::module_::import(kPayloadModule).attr("without_graph")(output);
}

}  // namespace pp_runtime
