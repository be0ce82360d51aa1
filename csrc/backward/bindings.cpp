#include "bindings.h"
#include "backward/full_backward.h"
#include "backward/split_backward.h"
#include "backward/step_leaves.h"

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <utility>
#include <vector>

namespace pp_runtime {

namespace py = pybind11;

namespace {

Roots roots_of(const std::vector<at::Tensor>& outputs, std::vector<at::Tensor> gradients) {
  TORCH_CHECK_VALUE(outputs.size() == gradients.size(), outputs.size(), " outputs, but ", gradients.size(),
                    " gradients.");
  Roots roots;
  for (const at::Tensor& output : outputs) {
    roots.edges.push_back(torch::autograd::impl::gradient_edge(output));
  }
  roots.grads = std::move(gradients);
  return roots;
}

py::tuple split(const std::vector<at::Tensor>& outputs, std::vector<at::Tensor> gradients,
                const std::vector<at::Tensor>& inputs) {
  Roots roots = roots_of(outputs, std::move(gradients));
  torch::autograd::edge_list input_edges;
  for (const at::Tensor& input : inputs) {
    input_edges.push_back(torch::autograd::impl::gradient_edge(input));
  }
  InputGradients halves;
  {
    py::gil_scoped_release no_gil;
    halves = captured_input_backward(std::move(roots), input_edges);
  }
  std::vector<std::optional<at::Tensor>> found;
  for (at::Tensor& gradient : halves.gradients) {
    found.push_back(gradient.defined() ? std::optional(std::move(gradient)) : std::nullopt);
  }
  return py::make_tuple(std::move(found), std::move(halves.weight_half));
}

}  // namespace

void bind_backward(py::module_& m) {
  py::class_<StepLeaves, std::shared_ptr<StepLeaves>>(m, "StepLeaves")
      .def(py::init<const std::vector<at::Tensor>&>(), py::arg("known"))
      .def("take", &StepLeaves::take);
  py::class_<WeightHalf>(m, "WeightHalf", "The weight gradients that an input backward left for later.")
      .def("run", &WeightHalf::run, py::arg("keep_graph") = false, py::call_guard<py::gil_scoped_release>(),
           "Accumulates them into the leaves, in one engine call. Once.");
  m.def(
      "full_backward",
      [](const std::vector<at::Tensor>& outputs, std::vector<at::Tensor> gradients, bool keep_graph) {
        Roots roots = roots_of(outputs, std::move(gradients));
        py::gil_scoped_release no_gil;
        full_backward(std::move(roots), keep_graph);
      },
      py::arg("outputs"), py::arg("gradients"), py::arg("keep_graph") = false,
      "One engine call from outputs with their gradients; accumulates into every leaf.");
  m.def("input_backward", &split, py::arg("outputs"), py::arg("gradients"), py::arg("inputs"),
        "One engine call for the inputs' gradients: (a gradient or None for each input, the WeightHalf).");
}

}  // namespace pp_runtime
