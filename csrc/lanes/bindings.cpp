#include "bindings.h"
#include "lanes/lanes.h"
#include "lanes/recorded_peer_memory.h"
#include "oversight/peer_memory.h"

#if PP_RUNTIME_CUDA
#include "cuda/peer_memory.h"
#endif

#include <torch/csrc/utils/pybind.h>

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pp_runtime {

namespace {

constexpr size_t kPageBytes = 4096;

const char* name_of(LaneRecord::Kind kind) {
  switch (kind) {
    case LaneRecord::Kind::kWork:
      return "work";
    case LaneRecord::Kind::kMark:
      return "mark";
    case LaneRecord::Kind::kWait:
      return "wait";
    case LaneRecord::Kind::kSignal:
      return "signal";
    case LaneRecord::Kind::kAwait:
      return "await";
    case LaneRecord::Kind::kPassed:
      break;
  }
  return "passed";
}

/// A page on this process's device, by which peers find out whether they can map the device's memory.
struct PeerPage {
  PeerMemory::Mapping mapping;
};

void bind_peer_memory(py::module_& m) {
  // No constructor: implementations are made by whoever has the device.
  py::class_<PeerMemory, std::shared_ptr<PeerMemory>>(m, "PeerMemory").def_property_readonly("name", &PeerMemory::name);
  py::class_<RecordedPeerMemory, PeerMemory, std::shared_ptr<RecordedPeerMemory>>(m, "RecordedPeerMemory")
      .def(py::init<>());
#if PP_RUNTIME_CUDA
  py::class_<cuda::CudaPeerMemory, PeerMemory, std::shared_ptr<cuda::CudaPeerMemory>>(m, "CudaPeerMemory")
      .def(py::init<at::Device>(), py::arg("device"));
#endif
  py::class_<PeerPage>(m, "PeerPage")
      .def(py::init([](PeerMemory& memory) {
             py::gil_scoped_release no_gil;
             return PeerPage{memory.allocate(memory.name(), kPageBytes)};
           }),
           py::arg("memory"))
      .def_property_readonly("fd", [](const PeerPage& page) { return page.mapping.fd; })
      .def_static(
          "opens",
          [](PeerMemory& memory, int64_t pid, int32_t fd, const std::string& device) {
            try {
              memory.open({.pid = pid, .fd = fd, .bytes = kPageBytes});
              // The sender makes the slots on the receiver's device, so it has to see that.
              memory.allocate(device, kPageBytes);
              return true;
            } catch (const std::exception&) {
              return false;
            }
          },
          py::arg("memory"), py::arg("pid"), py::arg("fd"), py::arg("device"),
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_lanes(py::module_& m) {
  bind_peer_memory(m);
  py::class_<LaneLog, std::shared_ptr<LaneLog>>(m, "LaneLog")
      .def(py::init<int64_t>(), py::arg("omitted_wait") = -1)
      .def("records",
           [](const LaneLog& log) {
             py::list records;
             for (const LaneRecord& record : log.records()) {
               records.append(py::make_tuple(name_of(record.kind), record.lane, record.event, record.text, record.reads,
                                             record.writes, record.time_ns));
             }
             return records;
           })
      .def("names", &LaneLog::names);
  py::class_<Lanes, std::shared_ptr<Lanes>>(m, "Lanes")
      .def(py::init<at::Device>(), py::arg("device"))
      .def(py::init<std::shared_ptr<LaneLog>>(), py::arg("log"))
      .def_property_readonly("device", &Lanes::device);
}

}  // namespace pp_runtime
