#include "precompiled.h"

#include "execution/step_values.h"

#include "execution/python_values.h"
#include "execution/stage.h"

#include <pybind11/cast.h>

#include <string>
#include <utility>

namespace py = pybind11;

namespace pp_runtime {

namespace {

py::list hand_over(std::vector<py::object>& objects) {
  py::list list;
  for (py::object& object : objects) {
    list.append(object ? std::move(object) : py::none());
  }
  objects.clear();
  return list;
}

}  // namespace

void StepValues::begin(StepInput input, size_t microbatches) {
  input_ = std::move(input);
  outputs_.assign(microbatches, py::object());
  losses_.assign(microbatches, py::object());
}

void StepValues::clear() {
  drop_input();
  outputs_.clear();
  losses_.clear();
}

void StepValues::forward(Stage& stage, size_t microbatch) {
  const auto index = static_cast<Py_ssize_t>(microbatch);
  PyObject* args = stage.is_first() ? PyList_GetItem(input_.args.ptr(), index) : nullptr;
  PyObject* kwargs = PyList_GetItem(input_.kwargs.ptr(), index);
  if ((stage.is_first() && args == nullptr) || kwargs == nullptr) {
    throw py::error_already_set();
  }
  const py::object output = stage.forward(microbatch, args, kwargs);
  if (stage.is_last()) {
    compute_loss(stage, microbatch, output);
  }
}

py::object StepValues::compute_loss(Stage& stage, size_t microbatch, const py::object& output) {
  py::object& kept = losses_.at(microbatch);
  if (input_.keep_outputs) {
    outputs_.at(microbatch) = without_graph(output);
  }
  if (!is_given(input_.targets) || !is_given(input_.loss_fn)) {
    return py::none();
  }
  const py::object target = input_.targets[py::int_(microbatch)];
  const py::object loss = is_given(input_.loss_kwargs) ? input_.loss_fn(output, target, **py::dict(input_.loss_kwargs))
                                                       : input_.loss_fn(output, target);
  if (!is_tensor(loss.ptr())) {
    throw py::type_error("loss_fn returned " + std::string(Py_TYPE(loss.ptr())->tp_name) + " for microbatch " +
                         std::to_string(microbatch) + ": let it return a tensor");
  }
  const at::Tensor& tensor = tensor_in(loss.ptr());
  stage.set_loss(microbatch, tensor);
  kept = wrapped(tensor.detach());
  return loss;
}

py::list StepValues::take_outputs() { return hand_over(outputs_); }

py::list StepValues::take_losses() { return hand_over(losses_); }

}  // namespace pp_runtime
