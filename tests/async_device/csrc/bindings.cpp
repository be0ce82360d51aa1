// What Python sees of the device: tests/async_device/device.py.

#include "allocator.h"
#include "device.h"
#include "log.h"
#include "peer_memory.h"
#include "process_group.h"
#include "settings.h"
#include "streams.h"

#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

#include <chrono>
#include <stdexcept>
#include <thread>

namespace py = pybind11;

namespace async_device {

namespace {

std::chrono::nanoseconds microseconds(double value) {
  return std::chrono::nanoseconds(static_cast<int64_t>(value * 1e3));
}

void set_delays(int64_t most_us, int64_t one_in, uint64_t seed) {
  settings().delay_us = most_us;
  settings().delay_one_in = one_in;
  settings().delay_seed = seed;
  ++settings().delay_draw;
}

void sleep_instead_of_computing(const std::map<std::string, double>& takes_us, double others_us, double transfer_us,
                                double launch_us) {
  settings().takes.clear();
  for (const auto& [name, duration] : takes_us) {
    settings().takes[name] = microseconds(duration);
  }
  settings().others_take = microseconds(others_us);
  settings().transfer_takes = microseconds(transfer_us);
  settings().launch_takes = microseconds(launch_us);
  settings().sleeps = true;
}

void queue_sleep(int64_t us) {
  current().queue([us](Time) {
    std::this_thread::sleep_for(std::chrono::microseconds(us));
    return Clock::now();
  });
}

void queue_failure(const std::string& what) {
  current().queue([what](Time) -> Time { throw std::runtime_error(what); });
}

py::dict counts_now() {
  const Counts& now = counts();
  py::dict numbers;
  numbers["tasks"] = now.tasks.load();
  numbers["waits"] = now.waits.load();
  numbers["marks"] = now.marks.load();
  numbers["launches"] = now.launches.load();
  numbers["synchronous"] = now.synchronous.load();
  numbers["host_waits"] = now.host_waits.load();
  numbers["poisoned"] = now.poisoned.load();
  return numbers;
}

py::list records() {
  py::list list;
  for (const Record& record : log().end()) {
    list.append(py::make_tuple(record.kind, record.stream, record.moment, record.text, record.reads, record.writes));
  }
  return list;
}

void bind_behaviour(py::module_& m) {
  m.def("set_delays", &set_delays, py::arg("most_us"), py::arg("one_in"), py::arg("seed"));
  m.def(
      "set_slow_stream",
      [](int64_t stream, int64_t us) {
        settings().slow_stream = stream;
        settings().slow_us = us;
      },
      py::arg("stream"), py::arg("us"));
  m.def("set_poison", [](bool on) { settings().poison = on; });
  m.def("set_rendezvous", [](bool on) { settings().rendezvous = on; });
  m.def("sleep_instead_of_computing", &sleep_instead_of_computing, py::arg("takes_us"), py::arg("others_us"),
        py::arg("transfer_us"), py::arg("launch_us"));
  m.def("compute_again", [] {
    settings().sleeps = false;
    settings().launch_takes = std::chrono::nanoseconds(0);
  });
  m.def("leave_out_await", &leave_out_await, py::arg("number"));
  m.def("queue_sleep", &queue_sleep, py::arg("us"));
  m.def("queue_failure", &queue_failure, py::arg("what"));
  m.def("forget_failure", &forget_failure);
}

void bind_observation(py::module_& m) {
  m.def("synchronize", &synchronize_device, py::call_guard<py::gil_scoped_release>());
  m.def("counts", &counts_now);
  m.def(
      "memory_in_use",
      [](bool forget) {
        const MemoryInUse found = memory_in_use(forget);
        return py::make_tuple(found.now, found.most);
      },
      py::arg("forget") = false);
  m.def("begin_log", [] { log().begin(); });
  m.def("end_log", &records);
  m.def("leave_out_wait", [](int64_t number) { log().leave_out(number); });
  m.def("leave_out_wait_between",
        [](int64_t waiting, int64_t awaited, int64_t number) { log().leave_out_between(waiting, awaited, number); });
  m.def("left_out", [] {
    const Log::LeftOut found = log().left_out();
    return py::make_tuple(found.waiting, found.awaited, found.number_between);
  });
}

}  // namespace

}  // namespace async_device

PYBIND11_MODULE(_async_device, m) {
  using namespace async_device;
  py::module_::import("torch");
  py::module_::import("torch._C._distributed_c10d");
  m.def("register_device", &register_device);
  bind_behaviour(m);
  bind_observation(m);
  py::module_::import("pp_runtime._C");
  py::class_<PeerMemory, pp_runtime::PeerMemory, std::shared_ptr<PeerMemory>>(m, "PeerMemory").def(py::init<>());
  py::class_<Group, c10d::Backend, c10::intrusive_ptr<Group>>(m, "Group")
      .def(py::init<const c10::intrusive_ptr<c10d::Store>&, int, int, std::string, c10::intrusive_ptr<c10d::Backend>>(),
           py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("name"), py::arg("collectives") = nullptr,
           py::call_guard<py::gil_scoped_release>());
}
