// The operators that make, look at, copy and read memory, which no fallback can stand in for.

#include "allocator.h"
#include "log.h"
#include "settings.h"
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cstring>
#include <utility>

namespace async_device {

namespace {

using Sizes = c10::SymIntArrayRef;

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(Sizes size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), allocator(), kKeys, c10::dtype_or_default(dtype),
                                   format);
}

at::Tensor empty_strided(Sizes size, Sizes stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                         std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(),
                                           kKeys, c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, Sizes size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& self, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  if (!is_ours(to)) {
    ++counts().synchronous;
    synchronize_current();
    const at::NoGradGuard no_grad;
    to.detach().copy_(on_cpu(self));
    return to;
  }
  // The host's memory is its own again at once: what is copied later is copied from a stage of ours.
  at::Tensor from = is_ours(self) ? on_cpu(self) : self.detach().clone();
  const auto reads = is_ours(self) ? std::vector<const void*>{address_of(self)} : std::vector<const void*>();
  launch("aten::copy_", [from = std::move(from), into = on_cpu(to)] { into.copy_(from); }, reads, {address_of(to)});
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  ++counts().synchronous;
  synchronize_current();
  return at::native::_local_scalar_dense_cpu(on_cpu(self));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_storage(self, std::move(storage), 0, {elements}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

const at::Tensor& resize(const at::Tensor& self, Sizes size, std::optional<c10::MemoryFormat>) {
  const auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  const auto elements = static_cast<size_t>(c10::multiply_integers(wanted) + self.storage_offset());
  const size_t bytes = elements * self.element_size();
  const size_t before = self.storage().nbytes();
  if (bytes > before) {
    auto* storage = self.storage().unsafeGetStorageImpl();
    auto fresh = allocator()->allocate(bytes);
    if (before > 0) {
      launch("aten::resize_", [from = storage->data(), to = fresh.get(), before] { std::memcpy(to, from, before); },
             {storage->data()}, {fresh.get()});
    }
    storage->set_data_ptr(std::move(fresh));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  return self;
}

void record_stream(at::Tensor& self, c10::Stream on) { record_on(self.storage().data(), on.id()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("resize_", resize);
  m.impl("record_stream", record_stream);
}

}  // namespace

}  // namespace async_device
