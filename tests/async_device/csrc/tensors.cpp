#include "tensors.h"

#include "log.h"
#include "settings.h"

#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <utility>

namespace async_device {

const void* address_of(const at::Tensor& tensor) {
  if (tensor.numel() == 0) {
    return nullptr;
  }
  // Not data_ptr(): that refuses tensors without storage, and marks copies on write as written.
  const void* memory = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->data();
  return static_cast<const char*>(memory) + tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
}

at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!is_ours(tensor)) {
    return tensor;
  }
  const auto options = at::TensorOptions(tensor.dtype()).device(at::kCPU);
  void* address = const_cast<void*>(address_of(tensor));
  return number_like(tensor, address == nullptr ? at::empty_strided(tensor.sizes(), tensor.strides(), options)
                                                : at::from_blob(address, tensor.sizes(), tensor.strides(), options));
}

at::Tensor number_like(const at::Tensor& from, at::Tensor to) {
  if (from.unsafeGetTensorImpl()->is_wrapped_number()) {
    to.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return to;
}

at::Tensor empty_as(const at::Tensor& other) {
  return at::empty_strided(other.sizes(), other.strides(),
                           at::TensorOptions(other.dtype()).device(c10::Device(kType, 0)));
}

void launch(const char* name, std::function<void()> kernel, const std::vector<const void*>& reads,
            const std::vector<const void*>& writes) {
  const Time begin = Clock::now();
  ++counts().launches;
  Stream& on = current();
  log().work(on.id(), name, reads, writes);
  on.launch(std::move(kernel), duration_of(name));
  while (Clock::now() - begin < settings().launch_takes) {
    // As a driver does that writes to a queue of the device.
  }
}

void synchronize_current() { synchronize(*current().mark()); }

}  // namespace async_device
