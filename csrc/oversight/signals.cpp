#include "oversight/signals.h"

#include <torch/csrc/utils/pybind.h>

namespace pp_runtime {

void check_signals() {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) {
    throw Interrupted();
  }
}

}  // namespace pp_runtime
