#include "execution/stage.h"

#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace pp_runtime {

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

}  // namespace pp_runtime
