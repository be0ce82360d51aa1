#pragma once

#include "backward/split_backward.h"
#include "backward/step_leaves.h"
#include "execution/python_values.h"
#include "execution/receive_node.h"
#include "transport/message.h"

#include <pybind11/pytypes.h>

#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

/// Which outputs of one stage are which inputs of another. Empty lists: every output, in order.
struct Edge {
  int64_t source = 0;
  int64_t destination = 0;
  std::vector<int64_t> outputs;
  std::vector<int64_t> inputs;
};

enum class BackwardKind : uint8_t { kFull, kInput, kWeight };

/// The user's Python functions of one stage. Touched with the GIL only.
struct StageCallbacks {
  /// (*args, **kwargs) -> output; the module, or the module in its data-parallel context.
  pybind11::object forward;
  /// (output) -> (tuple of tensors, structure bytes): for an output that is neither a tensor nor a tuple or list of
  /// tensors, or that has a tensor that cannot travel; raises where the output cannot.
  pybind11::object flatten;
  /// (tensors, structure bytes) -> args
  pybind11::object unflatten;
  /// (tensors, Nones among them) -> (what travels in their place, bytes that `wrap` understands), for DTensors.
  pybind11::object unwrap;
  /// (what came, bytes) -> tensors
  pybind11::object wrap;
  /// (last: bool, tensors whose graph is run) before a backward that may reduce gradients, and (last) after it; None
  /// where the stage is not data-parallel.
  pybind11::object before_backward;
  pybind11::object after_backward;
  /// () -> runner of the weight gradients, as torch's dw_builder; None where the stage has none.
  pybind11::object dw_builder;
};

/// One stage of this rank at run time: per microbatch, what has arrived and what its backward needs.
///
/// Owned by the executor's Python wrapper, used by its thread. Each method says whether it wants the GIL. Everything of
/// a microbatch is dropped as soon as nothing of the plan reads it; `clear` drops what a failed step left.
class Stage {
 public:
  Stage(int64_t index, bool is_first, bool is_last, StageCallbacks callbacks);

  int64_t index() const { return index_; }
  bool is_first() const { return is_first_; }
  bool is_last() const { return is_last_; }

  void set_edges(std::vector<Edge> in_edges, std::vector<Edge> out_edges);
  void set_callbacks(StageCallbacks callbacks);
  bool is_data_parallel() const { return is_data_parallel_; }
  /// Where leaves of this stage's graphs are looked for, until it is null.
  void follow_leaves(std::shared_ptr<StepLeaves> leaves) {
    leaves_ = std::move(leaves);
    has_looked_for_leaves_ = false;
  }

  /// Without the GIL, or with it.
  void begin_step(size_t microbatches, bool training, uint64_t step);

  /// Takes an activation message of an in-edge (from a channel or from a stage of the same rank). No GIL.
  void accept_activation(const Edge& edge, size_t microbatch, Message message);

  /// Runs the module. `args` is used by a first stage (or given by a custom function) and may be null elsewhere. GIL.
  pybind11::object forward(size_t microbatch, PyObject* args, PyObject* kwargs);

  /// The message of one out-edge; valid after forward. No GIL.
  Message activation(const Edge& edge, size_t microbatch) const;
  /// After the last send of a microbatch's outputs: drops them, keeps their gradient edges. No GIL.
  void release_outputs(size_t microbatch);

  /// The loss that this microbatch's backward begins at; takes the graph, not the tensor. No GIL.
  void set_loss(size_t microbatch, const at::Tensor& loss);
  /// A gradient message of an out-edge. No GIL.
  void accept_gradient(const Edge& edge, size_t microbatch, Message message);

  /// One engine call. No GIL; takes it where the stage is data-parallel or has a dw_builder.
  void backward(size_t microbatch, BackwardKind kind, bool last);

  /// The gradients that go back over one in-edge; valid after the full or the input backward, once an edge. No GIL.
  Message input_gradients(const Edge& edge, size_t microbatch);

  /// A microbatch by hand, for programs that run a stage's forward or backward themselves. With the GIL.

  /// The positional inputs that came, as leaves of a graph of their own; a second call gives the same ones.
  pybind11::object take_inputs(size_t microbatch);
  /// The stage's output; its graph is let go by `drop_graph`, or run by `backward`.
  void give_outputs(size_t microbatch, const pybind11::object& output);
  void drop_graph(size_t microbatch);
  /// The gradients that came for the outputs.
  std::vector<at::Tensor> take_output_gradients(size_t microbatch);
  void set_output_gradients(size_t microbatch, std::vector<at::Tensor> gradients);
  /// The gradients of the inputs, in place of those that a backward of the runtime's would have left.
  void give_input_gradients(size_t microbatch, std::vector<at::Tensor> gradients);
  std::vector<at::Tensor> input_gradients(size_t microbatch);

  void clear();

 private:
  struct Input {
    at::Tensor tensor;
    Owned<ReceiveNode> node;
    /// Taken by hand: `tensor` is a leaf that collects its own gradient.
    bool is_leaf = false;

    at::Tensor take_gradient();
  };

  struct Microbatch {
    std::vector<Input> inputs;
    std::string structure;
    /// What travels of the outputs.
    std::vector<at::Tensor> outputs;
    std::vector<torch::autograd::Edge> output_edges;
    std::vector<uint8_t> output_requires_grad;
    std::string output_structure;
    std::string output_wrappings;
    std::vector<at::Tensor> output_gradients;
    torch::autograd::Edge loss;
    at::Tensor loss_gradient;
    std::unique_ptr<WeightHalf> weight_half;
    SharedPython weight_runner;
    std::vector<at::Tensor> given_gradients;
    bool has_given_gradients = false;
    /// Its graph may end in leaves that no other microbatch's does.
    bool may_have_own_leaves = true;
  };

  /// For errors.
  std::string name_of(size_t microbatch) const;
  Microbatch& at(size_t microbatch);
  const Microbatch& at(size_t microbatch) const;
  pybind11::object received_args(Microbatch& state);
  pybind11::object build_args(const std::vector<at::Tensor>& tensors, std::string structure);
  void unwrap(Message& message);
  void wrap(Message& message);
  void look_for_leaves(Microbatch& state, const torch::autograd::edge_list& edges);
  std::vector<at::Tensor> graph_of(const Microbatch& state, BackwardKind kind) const;
  void keep_outputs(Microbatch& state, const pybind11::object& output);
  Roots take_roots(Microbatch& state);
  void run_backward(Microbatch& state, BackwardKind kind);
  Frame frame(size_t microbatch) const;

  int64_t index_;
  bool is_first_;
  bool is_last_;
  bool training_ = false;
  uint64_t step_ = 0;
  StageCallbacks callbacks_;
  bool is_data_parallel_ = false;
  std::shared_ptr<StepLeaves> leaves_;
  bool has_looked_for_leaves_ = false;
  std::vector<Edge> in_edges_;
  std::vector<Edge> out_edges_;
  std::vector<Microbatch> microbatches_;
};

}  // namespace pp_runtime
