#include "backward/bindings_backward.h"
#include "bindings_lanes.h"
#include "executor.h"
#include "signals.h"
#include "transport/c10d.h"
#include "transport/c10d_confirmation.h"
#include "transport/confirmation.h"
#include "transport/shared_memory.h"
#include "watch.h"
#include "whereabouts.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pp_runtime {

namespace {

std::chrono::nanoseconds nanoseconds(double seconds) {
  return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1'000'000'000));
}

void raise_with(py::handle kind, const char* what, const char* name, const py::object& value) {
  const py::object error = kind(what);
  error.attr(name) = value;
  PyErr_SetObject(kind.ptr(), error.ptr());
}

void bind_watch(py::module_& m) {
  py::register_exception<PeerFailed>(m, "PeerFailed", PyExc_RuntimeError);
  py::register_exception<StoreLost>(m, "StoreLost", PyExc_RuntimeError);
  // These two carry a number, so they are made by hand. The module holds the classes for the process's life.
  static const py::handle lost = py::exception<PeerLost>(m, "PeerLost", PyExc_RuntimeError).release();
  static const py::handle late = py::exception<WaitedTooLong>(m, "WaitedTooLong", PyExc_RuntimeError).release();
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (python_error& error) {
      error.restore();
    } catch (const PeerLost& error) {
      raise_with(lost, error.what(), "rank", py::int_(error.rank));
    } catch (const WaitedTooLong& error) {
      raise_with(late, error.what(), "seconds", py::float_(error.seconds));
    } catch (const Interrupted&) {
      // The Python error is set already.
    } catch (const c10::Error&) {
      torch::translate_exception_to_python(pointer);
    }
  });
  py::class_<Segment, std::shared_ptr<Segment>>(m, "Segment")
      .def_property_readonly("fd", &Segment::fd)
      .def_static("open", &Segment::open, py::arg("pid"), py::arg("fd"), py::arg("bytes"));
  py::class_<Watch, std::shared_ptr<Watch>>(m, "Watch")
      .def(py::init([](c10::intrusive_ptr<c10d::Store> store, std::string failure_key, double deadline_seconds) {
             return std::make_shared<Watch>(std::move(store), std::move(failure_key), deadline_seconds, check_signals);
           }),
           py::arg("store"), py::arg("failure_key"), py::arg("deadline_seconds"))
      .def("watch_process", &Watch::watch_process, py::arg("rank"), py::arg("pid"))
      .def("ended", &Watch::ended)
      .def("throw_lost", &Watch::throw_lost, py::arg("rank"))
      .def("failure", &Watch::failure, py::call_guard<py::gil_scoped_release>())
      .def("publish", &Watch::publish, py::arg("record"), py::call_guard<py::gil_scoped_release>())
      .def("set_deadline", &Watch::set_deadline, py::arg("seconds"));
  py::class_<Board, std::shared_ptr<Board>>(m, "Board")
      .def(py::init<std::shared_ptr<Segment>, size_t, size_t>(), py::arg("segment"), py::arg("ranks"),
           py::arg("own_rank"))
      .def_static("make", &Board::make, py::arg("ranks"))
      .def_static(
          "open", [](int64_t pid, int fd, size_t ranks) { return Segment::open(pid, fd, Board::bytes(ranks)); },
          py::arg("pid"), py::arg("fd"), py::arg("ranks"))
      .def(
          "read",
          [](const Board& board, size_t rank) {
            const Whereabouts found = board.read(rank);
            const std::chrono::duration<double> seconds =
                std::chrono::steady_clock::now().time_since_epoch() - found.since;
            const Activity& activity = found.activity;
            return py::make_tuple(activity.operation, activity.stage, activity.microbatch, activity.peer,
                                  activity.other_stage, seconds.count(), py::bytes(found.name));
          },
          py::arg("rank"));
  py::class_<Reporter, std::shared_ptr<Reporter>>(m, "Reporter")
      .def(py::init([](std::shared_ptr<Board> board, c10::intrusive_ptr<c10d::Store> store, std::string key,
                       double patience_seconds) {
             return std::make_shared<Reporter>(std::move(board), std::move(store), std::move(key),
                                               nanoseconds(patience_seconds));
           }),
           py::arg("board"), py::arg("store"), py::arg("key"), py::arg("patience_seconds"))
      .def(
          "set_patience", [](Reporter& reporter, double seconds) { reporter.set_patience(nanoseconds(seconds)); },
          py::arg("seconds"));
}

void bind_transport(py::module_& m) {
  py::class_<SendChannel, std::shared_ptr<SendChannel>>(m, "SendChannel");
  py::class_<ReceiveChannel, std::shared_ptr<ReceiveChannel>>(m, "ReceiveChannel");
  py::class_<SharedSendChannel, SendChannel, std::shared_ptr<SharedSendChannel>>(m, "SharedSendChannel")
      .def(py::init<uint32_t, uint32_t, std::string, std::shared_ptr<Watch>>(), py::arg("credits"), py::arg("ahead"),
           py::arg("name"), py::arg("watch"))
      .def_property_readonly("fd", &SharedSendChannel::fd)
      .def(
          "connect",
          [](SharedSendChannel& channel, int rank, int64_t pid, int64_t spin_ns) {
            channel.connect({.rank = rank, .pid = pid}, {.value = std::chrono::nanoseconds(spin_ns)});
          },
          py::arg("rank"), py::arg("pid"), py::arg("spin_ns"));
  py::class_<SharedReceiveChannel, ReceiveChannel, std::shared_ptr<SharedReceiveChannel>>(m, "SharedReceiveChannel")
      .def(py::init([](int rank, int64_t pid, int fd, std::string name, std::shared_ptr<Watch> watch, int64_t spin_ns) {
             return std::make_shared<SharedReceiveChannel>(Peer{.rank = rank, .pid = pid}, fd, std::move(name),
                                                           std::move(watch),
                                                           SpinTime{.value = std::chrono::nanoseconds(spin_ns)});
           }),
           py::arg("rank"), py::arg("pid"), py::arg("fd"), py::arg("name"), py::arg("watch"), py::arg("spin_ns"));
  py::class_<WaitGuard, std::shared_ptr<WaitGuard>>(m, "WaitGuard")
      .def(py::init<std::shared_ptr<Watch>>(), py::arg("watch"));
  const auto path = [](c10::intrusive_ptr<c10d::ProcessGroup> group, int peer, int tag, at::Device device,
                       std::string name,
                       size_t ahead) { return C10dPath{std::move(group), peer, tag, device, std::move(name), ahead}; };
  py::class_<C10dPath>(m, "C10dPath")
      .def(py::init(path), py::arg("group"), py::arg("peer"), py::arg("tag"), py::arg("device"), py::arg("name"),
           py::arg("ahead") = 0);
  py::class_<C10dSendChannel, SendChannel, std::shared_ptr<C10dSendChannel>>(m, "C10dSendChannel")
      .def(py::init<C10dPath, std::shared_ptr<Watch>, std::shared_ptr<WaitGuard>>(), py::arg("path"), py::arg("watch"),
           py::arg("guard"));
  py::class_<C10dReceiveChannel, ReceiveChannel, std::shared_ptr<C10dReceiveChannel>>(m, "C10dReceiveChannel")
      .def(py::init<C10dPath, std::shared_ptr<Watch>, std::shared_ptr<WaitGuard>>(), py::arg("path"), py::arg("watch"),
           py::arg("guard"));
  py::class_<Confirmation, std::shared_ptr<Confirmation>>(m, "Confirmation")
      .def("confirm", &Confirmation::confirm, py::call_guard<py::gil_scoped_release>());
  py::class_<SharedConfirmation, Confirmation, std::shared_ptr<SharedConfirmation>>(m, "SharedConfirmation")
      .def(py::init(
               [](int64_t pid, int fd, size_t ranks, size_t own_rank, std::shared_ptr<Watch> watch, int64_t spin_ns) {
                 return std::make_shared<SharedConfirmation>(Segment::open(pid, fd, SharedConfirmation::bytes(ranks)),
                                                             ranks, own_rank, std::move(watch),
                                                             SpinTime{.value = std::chrono::nanoseconds(spin_ns)});
               }),
           py::arg("pid"), py::arg("fd"), py::arg("ranks"), py::arg("own_rank"), py::arg("watch"), py::arg("spin_ns"))
      .def_static("make", &SharedConfirmation::make, py::arg("ranks"));
  py::class_<C10dConfirmation, Confirmation, std::shared_ptr<C10dConfirmation>>(m, "C10dConfirmation")
      .def(py::init<C10dPath, int, int, std::shared_ptr<WaitGuard>>(), py::arg("path"), py::arg("ranks"),
           py::arg("own_rank"), py::arg("guard"));
  py::class_<Token>(m, "Token")
      .def(py::init<uint64_t>(), py::arg("value"))
      .def_property_readonly("fd", &Token::fd)
      .def_static("matches", &Token::matches, py::arg("pid"), py::arg("fd"), py::arg("value"));
}

void bind_message(py::module_& m) {
  m.def("can_travel", &can_travel, py::arg("tensor"));
  m.def(
      "describe_message",
      [](const std::string& description) {
        return MessageSpec::decode(description.data(), description.size()).describe();
      },
      py::arg("description"));
}

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
  py::class_<StepLeaves, std::shared_ptr<StepLeaves>>(m, "StepLeaves")
      .def(py::init<const std::vector<at::Tensor>&>(), py::arg("known"))
      .def("take", &StepLeaves::take);
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
  py::class_<Executor>(m, "Executor")
      .def(py::init<const std::vector<int32_t>&, std::vector<std::shared_ptr<Stage>>, std::vector<Edge>,
                    std::vector<std::shared_ptr<SendChannel>>, std::vector<std::shared_ptr<ReceiveChannel>>,
                    std::vector<py::object>, std::vector<std::string>, size_t, std::shared_ptr<Confirmation>,
                    std::shared_ptr<Board>, std::shared_ptr<Lanes>>(),
           py::arg("program"), py::arg("stages"), py::arg("edges"), py::arg("send_channels"),
           py::arg("receive_channels"), py::arg("callbacks"), py::arg("callback_names"), py::arg("microbatches"),
           py::arg("confirmation"), py::arg("board"), py::arg("lanes"))
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

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The C++ runtime of pp_runtime.";
  bind_watch(m);
  bind_transport(m);
  bind_lanes(m);
  bind_message(m);
  bind_stage(m);
  bind_executor(m);
  bind_backward(m);
}

}  // namespace pp_runtime
