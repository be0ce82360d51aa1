// What the files that work on torch's graphs, or on Python's objects, include first. setup.py compiles it once: of the
// seconds that such a file takes, most are these headers'. It may be left out, and a file still includes what it uses.
// pybind11/pybind11.h is not here, as it makes every file that includes it compile pybind11's own functions.
#ifndef PP_RUNTIME_WITHOUT_PYTHON  // the sanitizers' builds
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/cast.h>
#include <pybind11/gil.h>
#include <torch/csrc/autograd/function.h>
#endif
