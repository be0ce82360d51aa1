#include "bindings.h"
#include "oversight/signals.h"
#include "oversight/watch.h"
#include "oversight/whereabouts.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/Store.hpp>

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

}  // namespace

void bind_oversight(py::module_& m) {
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
          py::arg("seconds"))
      .def("end_step", &Reporter::end_step);
}

}  // namespace pp_runtime
