#pragma once

#include <pybind11/pybind11.h>

namespace pp_runtime {

/// What pp_runtime/_backward.py calls.
void bind_backward(pybind11::module_& m);

}  // namespace pp_runtime
