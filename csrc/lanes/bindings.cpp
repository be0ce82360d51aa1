#include "bindings.h"
#include "lanes/lanes.h"

#include <torch/csrc/utils/pybind.h>

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
}

}  // namespace pp_runtime
