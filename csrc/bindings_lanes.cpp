#include "bindings_lanes.h"

#include "lanes.h"
#include "transport/c10d_lanes.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace pp_runtime {

namespace {

const char* name_of(LaneRecord::Kind kind) {
  switch (kind) {
    case LaneRecord::Kind::kWork:
      return "work";
    case LaneRecord::Kind::kMark:
      return "mark";
    case LaneRecord::Kind::kWait:
      return "wait";
    case LaneRecord::Kind::kPassed:
      break;
  }
  return "passed";
}

}  // namespace

void bind_lanes(py::module_& m) {
  py::class_<LaneLog, std::shared_ptr<LaneLog>>(m, "LaneLog")
      .def(py::init<int64_t>(), py::arg("omitted_wait") = -1)
      .def("records",
           [](const LaneLog& log) {
             py::list records;
             for (const LaneRecord& record : log.records()) {
               records.append(py::make_tuple(name_of(record.kind), record.lane, record.event, record.text, record.reads,
                                             record.writes));
             }
             return records;
           })
      .def("names", &LaneLog::names);
  py::class_<Lanes, std::shared_ptr<Lanes>>(m, "Lanes")
      .def(py::init<at::Device>(), py::arg("device"))
      .def(py::init<std::shared_ptr<LaneLog>>(), py::arg("log"));
  py::class_<LanePath>(m, "LanePath")
      .def(py::init([](std::shared_ptr<Lanes> lanes, c10::intrusive_ptr<c10d::Backend> communicator, int peer,
                       size_t slots,
                       bool owned) { return LanePath{std::move(lanes), std::move(communicator), peer, slots, owned}; }),
           py::arg("lanes"), py::arg("communicator"), py::arg("peer"), py::arg("slots"), py::arg("owned"));
  py::class_<LaneSendChannel, C10dSendChannel, std::shared_ptr<LaneSendChannel>>(m, "LaneSendChannel")
      .def(py::init<C10dPath, LanePath, std::shared_ptr<Watch>, std::shared_ptr<WaitGuard>>(), py::arg("path"),
           py::arg("on_device"), py::arg("watch"), py::arg("guard"));
  py::class_<LaneReceiveChannel, C10dReceiveChannel, std::shared_ptr<LaneReceiveChannel>>(m, "LaneReceiveChannel")
      .def(py::init<C10dPath, LanePath, std::shared_ptr<Watch>, std::shared_ptr<WaitGuard>>(), py::arg("path"),
           py::arg("on_device"), py::arg("watch"), py::arg("guard"));
}

}  // namespace pp_runtime
