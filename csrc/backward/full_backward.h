#pragma once

#include "backward/graph.h"

namespace pp_runtime {

/// The whole backward of one microbatch: one engine call that accumulates into leaves and ReceiveNodes.
/// Saved tensors are released on the way unless `keep_graph`. The caller does not hold the GIL.
void full_backward(Roots roots, bool keep_graph = false);

}  // namespace pp_runtime
