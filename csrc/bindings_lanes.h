#pragma once

#include <torch/csrc/utils/pybind.h>

namespace pp_runtime {

/// After the channels' own classes.
void bind_lanes(pybind11::module_& m);

}  // namespace pp_runtime
