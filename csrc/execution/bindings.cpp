#include "bindings.h"
#include "execution/executor.h"

#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pp_runtime {

namespace {

std::vector<at::Tensor> or_undefined(const std::vector<std::optional<at::Tensor>>& given) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(given.size());
  for (const auto& tensor : given) {
    tensors.push_back(tensor.value_or(at::Tensor()));
  }
  return tensors;
}

void bind_stage(py::module_& m) {
  py::class_<Edge>(m, "Edge").def(
      py::init([](int64_t source, int64_t destination, std::vector<int64_t> outputs, std::vector<int64_t> inputs) {
        return Edge{source, destination, std::move(outputs), std::move(inputs)};
      }),
      py::arg("source"), py::arg("destination"), py::arg("outputs") = std::vector<int64_t>(),
      py::arg("inputs") = std::vector<int64_t>());
  py::enum_<BackwardKind>(m, "BackwardKind")
      .value("FULL", BackwardKind::kFull)
      .value("INPUT", BackwardKind::kInput)
      .value("WEIGHT", BackwardKind::kWeight);
  py::class_<StageCallbacks>(m, "StageCallbacks")
      .def(py::init([](py::object forward, py::object flatten, py::object unflatten, py::object unwrap, py::object wrap,
                       py::object before, py::object after, py::object dw_builder) {
             return StageCallbacks{std::move(forward), std::move(flatten), std::move(unflatten), std::move(unwrap),
                                   std::move(wrap),    std::move(before),  std::move(after),     std::move(dw_builder)};
           }),
           py::arg("forward"), py::arg("flatten"), py::arg("unflatten"), py::arg("unwrap") = py::none(),
           py::arg("wrap") = py::none(), py::arg("before_backward") = py::none(),
           py::arg("after_backward") = py::none(), py::arg("dw_builder") = py::none());
  py::class_<Stage, std::shared_ptr<Stage>>(m, "Stage")
      .def(py::init<int64_t, bool, bool, StageCallbacks>(), py::arg("index"), py::arg("is_first"), py::arg("is_last"),
           py::arg("callbacks"))
      .def("set_callbacks", &Stage::set_callbacks, py::arg("callbacks"))
      .def("follow_leaves", &Stage::follow_leaves, py::arg("leaves").none(true))
      .def("begin_step", &Stage::begin_step, py::arg("microbatches"), py::arg("training"), py::arg("step"))
      .def(
          "forward",
          [](Stage& stage, size_t microbatch, const py::tuple& args, const py::dict& kwargs) {
            return stage.forward(microbatch, args.ptr(), kwargs.ptr());
          },
          py::arg("microbatch"), py::arg("args"), py::arg("kwargs"))
      .def("set_loss", &Stage::set_loss, py::arg("microbatch"), py::arg("loss"))
      .def("backward", &Stage::backward, py::arg("microbatch"), py::arg("kind"), py::arg("last"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "accept_activation",
          [](Stage& stage, size_t microbatch, const std::vector<at::Tensor>& tensors, std::string structure) {
            Message message{.frame = {}, .tensors = {}, .requires_grad = {}, .structure = std::move(structure)};
            for (const at::Tensor& tensor : tensors) {
              message.tensors.push_back(tensor.detach());
              message.requires_grad.push_back(static_cast<uint8_t>(tensor.requires_grad()));
            }
            stage.accept_activation(Edge{}, microbatch, std::move(message));
          },
          py::arg("microbatch"), py::arg("tensors"), py::arg("structure") = py::bytes())
      .def(
          "input_gradients", [](Stage& stage, size_t microbatch) { return stage.input_gradients(microbatch); },
          py::arg("microbatch"))
      .def("take_inputs", &Stage::take_inputs, py::arg("microbatch"))
      .def("give_outputs", &Stage::give_outputs, py::arg("microbatch"), py::arg("output"))
      .def("drop_graph", &Stage::drop_graph, py::arg("microbatch"))
      .def("take_output_gradients", &Stage::take_output_gradients, py::arg("microbatch"))
      .def(
          "give_input_gradients",
          [](Stage& stage, size_t microbatch, const std::vector<std::optional<at::Tensor>>& gradients) {
            stage.give_input_gradients(microbatch, or_undefined(gradients));
          },
          py::arg("microbatch"), py::arg("gradients"))
      .def(
          "set_output_gradients",
          [](Stage& stage, size_t microbatch, const std::vector<std::optional<at::Tensor>>& gradients) {
            stage.set_output_gradients(microbatch, or_undefined(gradients));
          },
          py::arg("microbatch"), py::arg("gradients"))
      .def("clear", &Stage::clear);
}

void bind_executor(py::module_& m) {
  py::class_<StepTotals>(m, "StepTotals")
      .def_readonly("training", &StepTotals::training)
      .def_readonly("step_ns", &StepTotals::step_ns)
      .def_readonly("compute_ns", &StepTotals::compute_ns)
      .def_readonly("waited_ns", &StepTotals::waited_ns)
      .def_readonly("sent_bytes", &StepTotals::sent_bytes)
      .def_readonly("received_bytes", &StepTotals::received_bytes);
  py::class_<Executor>(m, "Executor")
      .def(py::init<const std::vector<int32_t>&, std::vector<std::shared_ptr<Stage>>, std::vector<Edge>,
                    std::vector<std::shared_ptr<SendChannel>>, std::vector<std::shared_ptr<ReceiveChannel>>,
                    std::vector<py::object>, std::vector<std::string>, size_t, std::shared_ptr<Confirmation>,
                    std::shared_ptr<Board>, std::shared_ptr<Lanes>, std::shared_ptr<Watch>>(),
           py::arg("program"), py::arg("stages"), py::arg("edges"), py::arg("send_channels"),
           py::arg("receive_channels"), py::arg("callbacks"), py::arg("callback_names"), py::arg("microbatches"),
           py::arg("confirmation"), py::arg("board"), py::arg("lanes"), py::arg("watch"))
      .def(
          "run",
          [](Executor& executor, uint64_t step, py::list args, py::list kwargs, py::object targets, py::object loss_fn,
             py::object loss_kwargs, bool training, bool keep_outputs) {
            executor.run({std::move(args), std::move(kwargs), std::move(targets), std::move(loss_fn),
                          std::move(loss_kwargs), training, keep_outputs},
                         step);
          },
          py::arg("step"), py::arg("args"), py::arg("kwargs"), py::arg("targets"), py::arg("loss_fn"),
          py::arg("loss_kwargs"), py::arg("training"), py::arg("keep_outputs"))
      .def("compute_loss", &Executor::compute_loss, py::arg("stage"), py::arg("microbatch"), py::arg("output"))
      .def("take_outputs", &Executor::take_outputs)
      .def("take_losses", &Executor::take_losses)
      .def_property_readonly("position", &Executor::position)
      .def("text_of", &Executor::text_of, py::arg("instruction"))
      .def("stage_index_of", &Executor::stage_index_of, py::arg("instruction"))
      .def(
          "microbatch_of", [](const Executor& executor, size_t i) { return executor.program().at(i).microbatch; },
          py::arg("instruction"))
      .def("totals", &Executor::totals, py::return_value_policy::copy)
      .def("lane_seconds", &Executor::lane_seconds, py::call_guard<py::gil_scoped_release>())
      .def("set_recording", &Executor::set_recording, py::arg("on"))
      .def("take_trace",
           [](Executor& executor) {
             py::list records;
             for (const TraceRecord& record : executor.take_trace()) {
               records.append(py::make_tuple(executor.text_of(record.instruction), record.start_ns, record.end_ns,
                                             record.waited_ns));
             }
             return records;
           })
      .def("clear", &Executor::clear);
}

}  // namespace

void bind_execution(py::module_& m) {
  bind_stage(m);
  bind_executor(m);
}

}  // namespace pp_runtime
