#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>
#include <cstdint>

namespace async_device {

/// A caching allocator with the rules of CUDA's: a freed block is its stream's next one at once, whatever other streams
/// still do with it, unless their use was recorded; then it waits for them. Freed memory is poisoned (all bits set,
/// which is NaN) in the order of its stream, so that a reader that did not wait for its writer, or was not waited for,
/// computes NaN. Memory is never returned to the host. Any thread.
c10::Allocator* allocator();

/// The block that the address lies in is in use by the stream, besides the one that it was made on.
void record_on(const void* address, int64_t stream);

/// The number of the block that an address lies in; -1 where it is not the device's.
int64_t block_at(const void* address);

struct MemoryInUse {
  size_t now;
  size_t most;
};
/// Bytes in use, as asked for; `forget` makes the most so far what it is now.
MemoryInUse memory_in_use(bool forget);

}  // namespace async_device
