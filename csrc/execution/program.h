#pragma once

#include "oversight/operation.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace pp_runtime {

bool is_send(Operation operation);
bool is_receive(Operation operation);

/// What the executor reads. Indices are into the rank's own tables; `edge` and `channel` are those of a message,
/// `callback` that of a call. A call's stage and microbatch are only told in errors; -1 where it has none.
struct Instruction {
  Operation operation;
  /// The last backward of its stage in the step: data-parallel wrappers reduce in it.
  bool last;
  /// Nothing later sends these outputs: their tensors are dropped.
  bool releases_outputs;
  /// A call that is passed over where its stage is not data-parallel.
  bool only_data_parallel;
  /// Its time is the stage's own work: a forward, a backward, or a call that stands for one.
  bool computes;
  int32_t stage;
  int32_t microbatch;
  int32_t edge;
  int32_t channel;
  int32_t callback;
};

/// How many numbers a flattened instruction has: operation, flags, stage, microbatch, edge, channel, callback.
constexpr size_t kInstructionNumbers = 7;

struct ProgramLimits {
  size_t stages;
  size_t microbatches;
  size_t edges;
  size_t send_channels;
  size_t receive_channels;
  size_t callbacks;
};

/// A rank's program from its flat form; throws std::invalid_argument where a number is out of range.
std::vector<Instruction> read_program(const std::vector<int32_t>& numbers, const ProgramLimits& limits);

/// The action's text, as in torch's files: "2F3". A call has the text of its callback instead.
std::string action_text(Operation operation, int64_t stage, int64_t microbatch);

}  // namespace pp_runtime
