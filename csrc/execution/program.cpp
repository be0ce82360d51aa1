#include "execution/program.h"

#include <array>

namespace pp_runtime {

namespace {

constexpr int32_t kLastFlag = 1;
constexpr int32_t kReleasesFlag = 2;
constexpr int32_t kDataParallelFlag = 4;
constexpr int32_t kComputesFlag = 8;
constexpr int32_t kAllFlags = kLastFlag | kReleasesFlag | kDataParallelFlag | kComputesFlag;

void require(bool holds, size_t instruction, const char* what) {
  if (!holds) {
    throw std::invalid_argument("program: instruction " + std::to_string(instruction) + " has " + what +
                                " out of range");
  }
}

bool within(int32_t value, size_t count) { return value >= 0 && static_cast<size_t>(value) < count; }

bool is_compute(Operation operation) {
  return operation == Operation::kForward || operation == Operation::kBackward ||
         operation == Operation::kInputBackward || operation == Operation::kWeightBackward;
}

bool is_hand_over(Operation operation) {
  return operation == Operation::kHandForward || operation == Operation::kHandBackward;
}

}  // namespace

bool is_send(Operation operation) {
  return operation == Operation::kSendForward || operation == Operation::kSendBackward;
}

bool is_receive(Operation operation) {
  return operation == Operation::kReceiveForward || operation == Operation::kReceiveBackward;
}

std::vector<Instruction> read_program(const std::vector<int32_t>& numbers, const ProgramLimits& limits) {
  if (numbers.size() % kInstructionNumbers != 0) {
    throw std::invalid_argument("program: its length is not a multiple of " + std::to_string(kInstructionNumbers));
  }
  std::vector<Instruction> program;
  program.reserve(numbers.size() / kInstructionNumbers);
  for (size_t at = 0; at < numbers.size(); at += kInstructionNumbers) {
    const int32_t* n = &numbers[at];
    const size_t i = program.size();
    require(within(n[0], static_cast<size_t>(Operation::kCount)), i, "an operation");
    require(within(n[1], kAllFlags + 1), i, "flags");
    const auto operation = static_cast<Operation>(n[0]);
    if (operation == Operation::kCall) {
      require(within(n[6], limits.callbacks), i, "a callback");
      require(n[2] == -1 || within(n[2], limits.stages), i, "a stage");
      require(n[3] == -1 || within(n[3], limits.microbatches), i, "a microbatch");
    } else {
      require(within(n[2], limits.stages), i, "a stage");
      require(within(n[3], limits.microbatches), i, "a microbatch");
    }
    if (is_send(operation) || is_receive(operation) || is_hand_over(operation)) {
      require(within(n[4], limits.edges), i, "an edge");
    }
    if (is_send(operation)) {
      require(within(n[5], limits.send_channels), i, "a channel");
    } else if (is_receive(operation)) {
      require(within(n[5], limits.receive_channels), i, "a channel");
    } else if (is_hand_over(operation)) {
      require(within(n[5], limits.stages), i, "a target stage");
    }
    program.push_back({.operation = operation,
                       .last = (n[1] & kLastFlag) != 0,
                       .releases_outputs = (n[1] & kReleasesFlag) != 0,
                       .only_data_parallel = (n[1] & kDataParallelFlag) != 0 && n[2] >= 0,
                       .computes = (n[1] & kComputesFlag) != 0 || is_compute(operation),
                       .stage = n[2],
                       .microbatch = n[3],
                       .edge = n[4],
                       .channel = n[5],
                       .callback = n[6]});
  }
  return program;
}

std::string action_text(Operation operation, int64_t stage, int64_t microbatch) {
  static constexpr std::array<const char*, static_cast<size_t>(Operation::kCount)> kNames = {
      "F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "HAND_F", "HAND_B", "CALL"};
  return std::to_string(stage) + kNames.at(static_cast<size_t>(operation)) + std::to_string(microbatch);
}

}  // namespace pp_runtime
