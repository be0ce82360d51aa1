#pragma once

#include <exception>

namespace pp_runtime {

/// Python has a signal to deliver (Ctrl-C); the Python error is set when this is thrown.
struct Interrupted : std::exception {};

/// Runs the Python handlers of signals that came; throws Interrupted where one of them raised. Takes the GIL. Does
/// nothing on any thread but Python's main one.
void check_signals();

}  // namespace pp_runtime
