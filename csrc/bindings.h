#pragma once

#include <pybind11/pybind11.h>

namespace pp_runtime {

/// What each room shows to Python, in its own bindings.cpp.
void bind_oversight(pybind11::module_& m);
void bind_backward(pybind11::module_& m);
void bind_lanes(pybind11::module_& m);
void bind_transport(pybind11::module_& m);
void bind_execution(pybind11::module_& m);

}  // namespace pp_runtime
