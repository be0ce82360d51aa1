#pragma once

#include <cstdint>

namespace pp_runtime {

/// What a rank does at one instruction of its program. Its number stands in the flat programs that Python makes
/// (pp_runtime's lowering) and on the board that other ranks read.
enum class Operation : uint8_t {
  kForward,
  kBackward,
  kInputBackward,
  kWeightBackward,
  kSendForward,
  kReceiveForward,
  kSendBackward,
  kReceiveBackward,
  /// Hands activations, or gradients, to a stage of the same rank.
  kHandForward,
  kHandBackward,
  /// Calls a Python function: UNSHARD, RESHARD, REDUCE_GRAD, and whatever a user registered.
  kCall,
  kCount
};

}  // namespace pp_runtime
