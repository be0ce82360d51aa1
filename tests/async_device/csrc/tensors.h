#pragma once

#include "streams.h"

#include <ATen/core/Tensor.h>

#include <vector>

namespace async_device {

inline bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

/// The same memory as a CPU tensor. It does not keep the memory, as a kernel does not. Others are returned themselves.
at::Tensor on_cpu(const at::Tensor& tensor);

/// A number that Python gave stays one, which decides the dtypes of results.
at::Tensor number_like(const at::Tensor& from, at::Tensor to);

/// Uninitialised, on the device, as the other is on its own.
at::Tensor empty_as(const at::Tensor& other);

/// Where its elements begin; null where it has none.
const void* address_of(const at::Tensor& tensor);

/// A kernel on the current stream, with the memory that it touches for the log.
void launch(const char* name, std::function<void()> kernel, const std::vector<const void*>& reads,
            const std::vector<const void*>& writes);

/// The host waits for the current stream.
void synchronize_current();

}  // namespace async_device
