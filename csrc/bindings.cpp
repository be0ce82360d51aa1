#include "precompiled.h"

#include "bindings.h"

// One compilation for all rooms' bindings: pybind11's own functions are compiled in each, at three seconds.
#include "backward/bindings.cpp"
#include "execution/bindings.cpp"
#include "lanes/bindings.cpp"
#include "oversight/bindings.cpp"
#include "transport/bindings.cpp"

// The rooms of csrc/. A file includes files of its own room and of rooms below it, no others; tests/native holds this.
//
//     execution    a rank's program: its instructions, the stages that they run, the executor
//     transport    messages between ranks, one file a transport, and the end of a step on all of them
//     lanes        streams, events, slots, and the log that proves their order
//     backward     full and split
//     cuda         what only CUDA has
//     oversight    who is where, who failed, who waits for whom; and the memory that ranks of a host share
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The C++ runtime of pp_runtime.";
  // From the lowest up: a class is bound after those that it derives from or takes.
  pp_runtime::bind_oversight(m);
  pp_runtime::bind_backward(m);
  pp_runtime::bind_lanes(m);
  pp_runtime::bind_transport(m);
  pp_runtime::bind_execution(m);
}
