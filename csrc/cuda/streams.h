#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

namespace pp_runtime::cuda {

/// A CUDA stream of the device's highest priority that nobody else queues work on.
///
/// c10's own pool hands the same 32 streams to everybody: a lane that waits for another rank would hold up whoever was
/// given the same one. Any thread.
c10::Stream take_stream(c10::Device device);

/// Keeps a stream for the next `take_stream`, unless work of a failed step hangs on it. Streams are never destroyed:
/// torch's allocator keeps memory by stream.
void give_back(const c10::Stream& stream) noexcept;

}  // namespace pp_runtime::cuda
