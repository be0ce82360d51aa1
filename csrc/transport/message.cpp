#include "precompiled.h"

#include "transport/message.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace pp_runtime {

namespace {

constexpr size_t kMaximumDimensions = 64;
/// More than any memory holds, and far from where sums of sizes overflow.
constexpr size_t kMaximumBytes = size_t{1} << 48;

struct EncodedFrame {
  Frame frame;
  uint32_t tensors;
  uint32_t structure_bytes;
  uint32_t wrappings_bytes;
  uint32_t unused;  // where the compiler would leave bytes that nobody wrote
};
static_assert(std::has_unique_object_representations_v<EncodedFrame>);

struct EncodedTensor {
  uint8_t defined;
  uint8_t requires_grad;
  uint8_t dtype;
  uint8_t dimensions;
  uint8_t strided;
};

class Reader {
 public:
  Reader(const char* bytes, size_t size) : at_(bytes), end_(bytes + size) {}

  template <typename T>
  T take() {
    T value;
    std::memcpy(&value, claim(sizeof(T)), sizeof(T));
    return value;
  }

  std::string take_text(size_t size) { return {claim(size), size}; }

 private:
  const char* claim(size_t size) {
    if (static_cast<size_t>(end_ - at_) < size) {
      throw std::runtime_error("a message's description is cut short");
    }
    return std::exchange(at_, at_ + size);
  }

  const char* at_;
  const char* end_;
};

template <typename T>
void append(std::string& bytes, const T& value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

/// Whether this is the number of a dtype whose tensors can be made over given bytes.
bool is_known(uint8_t dtype) {
  if (dtype >= static_cast<uint8_t>(at::ScalarType::NumOptions)) {
    return false;
  }
  const auto type = static_cast<at::ScalarType>(dtype);
  return type != at::ScalarType::Undefined && !at::isQIntType(type);
}

/// The bytes of a tensor of these sizes; throws where they cannot be a tensor's.
size_t checked_bytes(const std::vector<int64_t>& sizes, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype);
  bool empty = false;
  for (const int64_t size : sizes) {
    empty = empty || size == 0;
    // The product of the other sizes is bounded also where one of them is zero: torch multiplies them all the same.
    if (size < 0 || __builtin_mul_overflow(bytes, std::max<size_t>(size, 1), &bytes) || bytes > kMaximumBytes) {
      throw std::runtime_error("a message's description holds an impossible tensor size");
    }
  }
  return empty ? 0 : bytes;
}

/// Throws unless the strides are those of a dense tensor: a permutation of a contiguous one.
void check_dense(const TensorSpec& tensor) {
  std::vector<size_t> order(tensor.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return tensor.strides[a] < tensor.strides[b]; });
  int64_t expected = 1;
  for (const size_t dimension : order) {
    if (tensor.sizes[dimension] == 1) {
      continue;
    }
    if (tensor.strides[dimension] != expected) {
      throw std::runtime_error("a message's description holds strides of a tensor that is not dense");
    }
    expected *= tensor.sizes[dimension];
  }
}

bool keeps_strides(const at::Tensor& tensor) {
  return !tensor.is_contiguous() && tensor.is_non_overlapping_and_dense() && tensor.numel() > 0;
}

void place(MessageSpec& spec) {
  size_t offset = 0;
  for (TensorSpec& tensor : spec.tensors) {
    tensor.offset = offset;
    if (tensor.defined) {
      tensor.bytes = checked_bytes(tensor.sizes, tensor.dtype);
      offset = align_up(offset + tensor.bytes, kPayloadAlignment);
      if (offset > kMaximumBytes) {
        throw std::runtime_error("a message's description holds more than any memory does");
      }
    }
  }
  spec.payload_bytes = offset;
}

}  // namespace

bool can_travel(const at::Tensor& tensor) {
  if (tensor.layout() != at::kStrided || tensor.is_quantized() || tensor.is_meta()) {
    return false;
  }
  try {
    return tensor.numel() == 0 || (tensor.has_storage() && tensor.storage().data() != nullptr);
  } catch (const c10::Error&) {
    // Some wrappers refuse to show what they do not have.
    return false;
  }
}

MessageSpec MessageSpec::of(const Message& message) {
  MessageSpec spec{
      .frame = message.frame, .tensors = {}, .structure = message.structure, .wrappings = message.wrappings};
  spec.tensors.reserve(message.tensors.size());
  for (size_t i = 0; i < message.tensors.size(); ++i) {
    TensorSpec& tensor = spec.tensors.emplace_back();
    if (!message.tensors[i].defined()) {
      continue;
    }
    tensor.defined = true;
    tensor.requires_grad = message.requires_grad[i] != 0;
    tensor.dtype = message.tensors[i].scalar_type();
    tensor.sizes = message.tensors[i].sizes().vec();
    if (keeps_strides(message.tensors[i])) {
      tensor.strides = message.tensors[i].strides().vec();
    }
  }
  place(spec);
  return spec;
}

std::string MessageSpec::encode() const {
  std::string bytes;
  append(bytes, EncodedFrame{.frame = frame,
                             .tensors = static_cast<uint32_t>(tensors.size()),
                             .structure_bytes = static_cast<uint32_t>(structure.size()),
                             .wrappings_bytes = static_cast<uint32_t>(wrappings.size()),
                             .unused = 0});
  for (const TensorSpec& tensor : tensors) {
    append(bytes, EncodedTensor{.defined = static_cast<uint8_t>(tensor.defined),
                                .requires_grad = static_cast<uint8_t>(tensor.requires_grad),
                                .dtype = static_cast<uint8_t>(tensor.dtype),
                                .dimensions = static_cast<uint8_t>(tensor.sizes.size()),
                                .strided = static_cast<uint8_t>(!tensor.strides.empty())});
    for (const int64_t size : tensor.sizes) {
      append(bytes, size);
    }
    for (const int64_t stride : tensor.strides) {
      append(bytes, stride);
    }
  }
  return bytes + structure + wrappings;
}

MessageSpec MessageSpec::decode(const char* bytes, size_t size) {
  Reader reader(bytes, size);
  const auto head = reader.take<EncodedFrame>();
  if (head.tensors > size / sizeof(EncodedTensor)) {
    throw std::runtime_error("a message's description names more tensors than it holds");
  }
  MessageSpec spec{.frame = head.frame, .tensors = {}, .structure = {}};
  spec.tensors.resize(head.tensors);
  for (TensorSpec& tensor : spec.tensors) {
    const auto encoded = reader.take<EncodedTensor>();
    if (!is_known(encoded.dtype) || encoded.dimensions > kMaximumDimensions) {
      throw std::runtime_error("a message's description holds an unknown dtype or too many dimensions");
    }
    tensor.defined = encoded.defined != 0;
    tensor.requires_grad = encoded.requires_grad != 0;
    tensor.dtype = static_cast<at::ScalarType>(encoded.dtype);
    tensor.sizes.resize(encoded.dimensions);
    for (int64_t& dimension : tensor.sizes) {
      dimension = reader.take<int64_t>();
    }
    if (encoded.strided != 0) {
      tensor.strides.resize(encoded.dimensions);
      for (int64_t& stride : tensor.strides) {
        stride = reader.take<int64_t>();
      }
      if (checked_bytes(tensor.sizes, tensor.dtype) == 0) {
        throw std::runtime_error("a message's description holds strides of an empty tensor");
      }
      check_dense(tensor);
    }
  }
  spec.structure = reader.take_text(head.structure_bytes);
  spec.wrappings = reader.take_text(head.wrappings_bytes);
  place(spec);
  return spec;
}

Message MessageSpec::take_message() {
  Message message{.frame = frame,
                  .tensors = {},
                  .requires_grad = {},
                  .structure = std::move(structure),
                  .wrappings = std::move(wrappings)};
  message.requires_grad.reserve(tensors.size());
  for (const TensorSpec& tensor : tensors) {
    message.requires_grad.push_back(static_cast<uint8_t>(tensor.requires_grad));
  }
  return message;
}

std::string MessageSpec::describe() const {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < tensors.size(); ++i) {
    text << (i == 0 ? "" : ", ");
    if (!tensors[i].defined) {
      text << "None";
      continue;
    }
    text << c10::toString(tensors[i].dtype) << "[";
    for (size_t d = 0; d < tensors[i].sizes.size(); ++d) {
      text << (d == 0 ? "" : ", ") << tensors[i].sizes[d];
    }
    text << "]" << (tensors[i].requires_grad ? " requiring grad" : "");
  }
  text << ")";
  return text.str();
}

void pack(const Message& message, const MessageSpec& spec, char* payload) {
  for (size_t i = 0; i < spec.tensors.size(); ++i) {
    const TensorSpec& tensor = spec.tensors[i];
    if (tensor.bytes == 0) {
      continue;
    }
    const at::Tensor& source = message.tensors[i];
    if (source.is_cpu() && (source.is_contiguous() || !tensor.strides.empty()) && !source.is_conj() &&
        !source.is_neg()) {
      std::memcpy(payload + tensor.offset, source.const_data_ptr(), tensor.bytes);
    } else {
      tensor.view(payload, [](void*) {}, source.options().device(at::kCPU).requires_grad(false)).copy_(source);
    }
  }
}

at::Tensor TensorSpec::view(char* payload, const std::function<void(void*)>& release, at::TensorOptions options) const {
  if (bytes == 0) {
    return at::empty(sizes, options.dtype(dtype));
  }
  // Without a target torch asks the driver where the pointer leads, and memory of another device would name that.
  const std::optional<at::Device> device = options.device_opt();
  char* data = payload + offset;
  if (strides.empty()) {
    return at::for_blob(data, sizes).deleter(release).options(options.dtype(dtype)).target_device(device).make_tensor();
  }
  return at::for_blob(data, sizes)
      .strides(strides)
      .deleter(release)
      .options(options.dtype(dtype))
      .target_device(device)
      .make_tensor();
}

std::vector<at::Tensor> unpack(const at::Tensor& buffer, size_t offset, const MessageSpec& spec,
                               const std::shared_ptr<void>& holder) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(spec.tensors.size());
  for (const TensorSpec& tensor : spec.tensors) {
    if (!tensor.defined) {
      tensors.emplace_back();
    } else {
      tensors.push_back(
          tensor.view(static_cast<char*>(buffer.mutable_data_ptr()) + offset, [holder](void*) {}, buffer.options()));
    }
  }
  return tensors;
}

}  // namespace pp_runtime
