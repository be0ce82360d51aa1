#include "oversight/signals.h"

#include <Python.h>

namespace pp_runtime {

void check_signals() {
  const PyGILState_STATE gil = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(gil);
  if (raised) {
    throw Interrupted();
  }
}

}  // namespace pp_runtime
