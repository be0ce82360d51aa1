#pragma once

#include <pybind11/pytypes.h>

#include <cstddef>
#include <vector>

namespace pp_runtime {

class Stage;

/// What the user gave for one step, in microbatch order. Held by `Executor::run`'s caller for as long as it runs.
struct StepInput {
  pybind11::list args;
  pybind11::list kwargs;
  pybind11::object targets;
  pybind11::object loss_fn;
  pybind11::object loss_kwargs;
  bool training = false;
  bool keep_outputs = false;
};

/// The user's values of a step: what was given, and the outputs and losses that come back.
///
/// Owned by the executor. GIL held, but for `training`.
class StepValues {
 public:
  void begin(StepInput input, size_t microbatches);
  /// Lets go of what was given.
  void drop_input() { input_ = StepInput(); }
  void clear();

  bool training() const { return input_.training; }

  /// Runs the stage on the microbatch's arguments, and the loss function after the last stage.
  void forward(Stage& stage, size_t microbatch);
  /// The loss of a microbatch from the last stage's output; keeps both for the user.
  pybind11::object compute_loss(Stage& stage, size_t microbatch, const pybind11::object& output);

  /// In microbatch order; None where a microbatch has none. Handed over: a second call gives empty lists.
  pybind11::list take_outputs();
  pybind11::list take_losses();

 private:
  StepInput input_;
  std::vector<pybind11::object> outputs_;
  std::vector<pybind11::object> losses_;
};

}  // namespace pp_runtime
