#pragma once

#include "execution/program.h"
#include "lanes/lanes.h"
#include "transport/message.h"

#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

/// What each action of a step waits for on the device, and what waits for it.
///
/// Asked by the executor around every instruction, on its thread; the executor has none on a CPU. An action waits for
/// the messages that it reads and for no others; a message waits for the action that made it and for nothing later.
class StepLanes {
 public:
  /// `stages` are the indices of the rank's stages, as the program numbers them.
  StepLanes(std::shared_ptr<Lanes> lanes, const std::vector<Instruction>& program, std::vector<int64_t> stages,
            size_t microbatches);

  void begin_step(uint64_t step);
  /// `name` is the action's text, for the log.
  void before(const Instruction& instruction, const std::string& name);
  void after(const Instruction& instruction);
  /// A message that is about to be sent: what it waits for.
  void sending(const Instruction& instruction, Message& message);
  /// A message that came, before the stage takes it.
  void received(const Instruction& instruction, const Message& message);

  bool logs() const { return lanes_->log() != nullptr; }

 private:
  /// One microbatch of one stage.
  struct Microbatch {
    std::vector<LaneTicket> activations;
    std::vector<LaneTicket> gradients;
    MarkPointer outputs;
    MarkPointer input_gradients;
    bool has_gradient = false;
  };

  Microbatch& at(int32_t stage, int32_t microbatch);
  void wait_for(std::vector<LaneTicket>& tickets);
  /// What the log calls the tensors that an action makes for an edge.
  std::string memory_of(const Instruction& instruction, bool outputs, int32_t edge) const;

  std::shared_ptr<Lanes> lanes_;
  std::vector<int64_t> stages_;
  size_t microbatches_;
  std::vector<Microbatch> table_;
  uint64_t step_ = 0;
  /// For each stage, the edges over which its outputs, and its input gradients, go to other ranks.
  std::vector<std::vector<int32_t>> output_edges_;
  std::vector<std::vector<int32_t>> gradient_edges_;
};

}  // namespace pp_runtime
