#include "precompiled.h"

#include "backward/full_backward.h"

#include <torch/csrc/autograd/engine.h>

namespace pp_runtime {

void full_backward(Roots roots, bool keep_graph) {
  if (roots.edges.empty()) {
    return;
  }
  // torch.autograd.backward would want tensors, and the stage keeps none: it kept edges.
  torch::autograd::Engine::get_default_engine().execute(roots.edges, roots.grads, keep_graph,
                                                        /*create_graph=*/false, /*accumulate_grad=*/true);
}

}  // namespace pp_runtime
