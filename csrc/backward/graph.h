#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace pp_runtime {

/// How torch owns its nodes: intrusive_ptr since torch 2.13, shared_ptr before.
using NodePointer = decltype(torch::autograd::Edge::function);

constexpr bool kSharedNodes = std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>;

template <class T>
using Owned = std::conditional_t<kSharedNodes, std::shared_ptr<T>, c10::intrusive_ptr<T>>;

template <class T, class... Arguments>
Owned<T> make_node(Arguments&&... arguments) {
  if constexpr (kSharedNodes) {
    // deleteNode, found by its argument, takes a long graph apart without recursion; torch 2.13 needs none.
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  }
}

/// Where a backward begins: gradients and the edges they enter the graph by. A root without gradient is not listed.
struct Roots {
  torch::autograd::edge_list edges;
  torch::autograd::variable_list grads;
};

}  // namespace pp_runtime
