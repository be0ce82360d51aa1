#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

struct LaneTicket;

/// Which message of which step this is; the receiver checks it, so two ranks in different steps are told apart at once.
struct Frame {
  uint64_t step = 0;
  uint32_t microbatch = 0;
  uint32_t training = 0;

  bool operator==(const Frame&) const = default;
};

/// What travels on a channel at once: the tensors of one edge for one microbatch, in the edge's order.
/// An undefined tensor is a None (a gradient that does not exist). A tensor here never carries a graph.
struct Message {
  Frame frame;
  std::vector<at::Tensor> tensors;
  std::vector<uint8_t> requires_grad;
  /// How the tensors are nested in the sender's output; empty for a plain tuple of tensors.
  std::string structure;
  /// How tensors of subclasses (DTensors) are made again from the plain ones that travel; empty where there are none.
  std::string wrappings = {};
  /// What the message waits for on its device (lanes.h); null for one of the host.
  std::shared_ptr<LaneTicket> lane = nullptr;
};

/// Whether a tensor's values are bytes that `pack` can copy: strided, with storage of its own (a DTensor's wrapper has
/// none).
bool can_travel(const at::Tensor& tensor);

/// Shape, dtype and gradient flag of one tensor of a message, and where its bytes lie in the packed message.
/// A dense tensor arrives with the strides it had (so that what is computed from it is computed alike); any other
/// arrives contiguous.
struct TensorSpec {
  bool defined = false;
  bool requires_grad = false;
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> sizes;
  /// Empty for a contiguous tensor.
  std::vector<int64_t> strides;
  size_t offset = 0;
  size_t bytes = 0;

  /// The tensor over its bytes in `payload`; `release` is called when it dies.
  at::Tensor view(char* payload, const std::function<void(void*)>& release, at::TensorOptions options) const;
};

/// A message's own description: enough to allocate its storage and to say what differs from what was expected.
struct MessageSpec {
  Frame frame;
  std::vector<TensorSpec> tensors;
  std::string structure;
  std::string wrappings = {};
  size_t payload_bytes = 0;

  static MessageSpec of(const Message& message);
  /// Throws std::runtime_error where the bytes are not a description that `encode` could have made.
  static MessageSpec decode(const char* bytes, size_t size);
  std::string encode() const;
  std::string describe() const;
  /// The message but for its tensors; the texts move into it.
  Message take_message();
};

/// Every tensor of a packed message begins at a multiple of this many bytes.
constexpr size_t kPayloadAlignment = 64;

constexpr size_t align_up(size_t value, size_t alignment) { return (value + alignment - 1) / alignment * alignment; }

/// Copies the tensors (with any strides) into `payload` at the offsets of `spec`.
void pack(const Message& message, const MessageSpec& spec, char* payload);

/// The tensors of `spec` as views of one packed buffer, from `offset` on; they keep `holder` alive.
std::vector<at::Tensor> unpack(const at::Tensor& buffer, size_t offset, const MessageSpec& spec,
                               const std::shared_ptr<void>& holder);

}  // namespace pp_runtime
