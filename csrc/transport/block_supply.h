#pragma once

#include "transport/message.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace pp_runtime {

/// How many blocks a sending channel has for its messages, and of which size; what it does when they are too small or
/// too few. All blocks are of one size; there are `credits` of them, from the plan's live intervals, and more where a
/// user keeps some for longer.
class BlockSupply {
 public:
  struct Growth {
    size_t block_bytes;
    uint32_t blocks;
    /// Blocks of the size before are outgrown: not used again.
    bool outgrows;

    size_t bytes() const { return block_bytes * blocks; }
  };

  /// A block's size is a multiple of `granule`.
  BlockSupply(uint32_t credits, size_t granule) : credits_(credits), granule_(granule) {}

  size_t block_bytes() const { return block_bytes_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t credits() const { return credits_; }

  /// What to add for messages of `bytes`.
  Growth growth(size_t bytes) const {
    const bool larger = bytes > block_bytes_;
    // A quarter more than asked, so that lengths that creep up do not outgrow the blocks each time.
    const size_t wanted = block_bytes_ == 0 ? bytes : bytes + bytes / 4;
    return {.block_bytes = larger ? align_up(wanted, granule_) : block_bytes_,
            .blocks = larger || blocks_ == 0 ? credits_ : std::max(1U, blocks_ / 2),
            .outgrows = larger};
  }

  void grew(const Growth& growth) {
    blocks_ = growth.blocks + (growth.outgrows ? 0 : blocks_);
    block_bytes_ = growth.block_bytes;
  }

  /// How long a sender waits for a block to come back before it adds some.
  static constexpr std::chrono::milliseconds kPatience{100};

 private:
  uint32_t credits_;
  size_t granule_;
  size_t block_bytes_ = 0;
  uint32_t blocks_ = 0;
};

}  // namespace pp_runtime
