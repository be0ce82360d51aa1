#include "execution/step_lanes.h"

#include <algorithm>
#include <utility>

namespace pp_runtime {

namespace {

bool is_backward(Operation operation) {
  return operation == Operation::kBackward || operation == Operation::kInputBackward ||
         operation == Operation::kWeightBackward;
}

/// The slots that tensors still lie in; of the others the memory may be in use again.
void append_alive(std::vector<std::string>& buffers, const std::vector<LaneTicket>& tickets) {
  for (const LaneTicket& ticket : tickets) {
    if (!ticket.slot.expired()) {
      buffers.push_back(ticket.buffer);
    }
  }
}

void add_once(std::vector<int32_t>& numbers, int32_t number) {
  if (std::find(numbers.begin(), numbers.end(), number) == numbers.end()) {
    numbers.push_back(number);
  }
}

}  // namespace

StepLanes::StepLanes(std::shared_ptr<Lanes> lanes, const std::vector<Instruction>& program, std::vector<int64_t> stages,
                     size_t microbatches)
    : lanes_(std::move(lanes)),
      stages_(std::move(stages)),
      microbatches_(microbatches),
      table_(stages_.size() * microbatches),
      output_edges_(stages_.size()),
      gradient_edges_(stages_.size()) {
  for (const Instruction& instruction : program) {
    if (instruction.operation == Operation::kSendForward) {
      add_once(output_edges_[instruction.stage], instruction.edge);
    } else if (instruction.operation == Operation::kSendBackward) {
      add_once(gradient_edges_[instruction.stage], instruction.edge);
    }
  }
}

StepLanes::Microbatch& StepLanes::at(int32_t stage, int32_t microbatch) {
  return table_[static_cast<size_t>(stage) * microbatches_ + static_cast<size_t>(microbatch)];
}

std::string StepLanes::memory_of(const Instruction& instruction, bool outputs, int32_t edge) const {
  if (!logs()) {
    return {};
  }
  return std::string(outputs ? "outputs" : "input gradients") + " of stage " +
         std::to_string(stages_[instruction.stage]) + " for edge " + std::to_string(edge) + ", microbatch " +
         std::to_string(instruction.microbatch) + ", step " + std::to_string(step_);
}

void StepLanes::begin_step(uint64_t step) {
  step_ = step;
  lanes_->begin_step();
  for (Microbatch& microbatch : table_) {
    microbatch = Microbatch();
  }
}

void StepLanes::wait_for(std::vector<LaneTicket>& tickets) {
  for (LaneTicket& ticket : tickets) {
    if (ticket.ready) {
      std::exchange(ticket.ready, nullptr)->hold_back(lanes_->compute());
    }
  }
}

void StepLanes::before(const Instruction& instruction, const std::string& name) {
  if (instruction.operation == Operation::kCall) {
    // The user's function may read whatever has come.
    std::vector<std::string> reads;
    for (Microbatch& microbatch : table_) {
      wait_for(microbatch.activations);
      wait_for(microbatch.gradients);
      if (logs()) {
        append_alive(reads, microbatch.activations);
        append_alive(reads, microbatch.gradients);
      }
    }
    if (LaneLog* log = lanes_->log()) {
      log->work(lanes_->compute().id(), name, std::move(reads), {});
    }
    return;
  }
  if (instruction.operation == Operation::kHandBackward) {
    // Gradients of one output from several stages are added as they come.
    Microbatch& receiver = at(instruction.channel, instruction.microbatch);
    wait_for(receiver.gradients);
    receiver.has_gradient = true;
    return;
  }
  const bool backward = is_backward(instruction.operation);
  if (!backward && instruction.operation != Operation::kForward) {
    return;
  }
  Microbatch& microbatch = at(instruction.stage, instruction.microbatch);
  wait_for(microbatch.activations);
  wait_for(microbatch.gradients);
  if (LaneLog* log = lanes_->log()) {
    std::vector<std::string> reads;
    append_alive(reads, microbatch.activations);
    append_alive(reads, microbatch.gradients);
    std::vector<std::string> writes;
    if (instruction.operation != Operation::kWeightBackward) {
      for (const int32_t edge : (backward ? gradient_edges_ : output_edges_)[instruction.stage]) {
        writes.push_back(memory_of(instruction, !backward, edge));
      }
    }
    log->work(lanes_->compute().id(), name, std::move(reads), std::move(writes));
  }
}

void StepLanes::after(const Instruction& instruction) {
  if (instruction.operation == Operation::kForward && !output_edges_[instruction.stage].empty()) {
    at(instruction.stage, instruction.microbatch).outputs = lanes_->mark(lanes_->compute());
  } else if ((instruction.operation == Operation::kBackward || instruction.operation == Operation::kInputBackward) &&
             !gradient_edges_[instruction.stage].empty()) {
    at(instruction.stage, instruction.microbatch).input_gradients = lanes_->mark(lanes_->compute());
  }
}

void StepLanes::sending(const Instruction& instruction, Message& message) {
  const bool forward = instruction.operation == Operation::kSendForward;
  const Microbatch& microbatch = at(instruction.stage, instruction.microbatch);
  MarkPointer ready = forward ? microbatch.outputs : microbatch.input_gradients;
  if (!ready) {
    // A function of the user's own made it.
    ready = lanes_->mark(lanes_->compute());
  }
  message.lane = std::make_shared<LaneTicket>(
      LaneTicket{.ready = std::move(ready), .buffer = memory_of(instruction, forward, instruction.edge), .slot = {}});
}

void StepLanes::received(const Instruction& instruction, const Message& message) {
  if (!message.lane) {
    return;
  }
  Microbatch& microbatch = at(instruction.stage, instruction.microbatch);
  if (instruction.operation == Operation::kReceiveForward) {
    microbatch.activations.push_back(*message.lane);
    return;
  }
  microbatch.gradients.push_back(*message.lane);
  if (std::exchange(microbatch.has_gradient, true)) {
    // The stage adds it to what came before.
    wait_for(microbatch.gradients);
    if (LaneLog* log = lanes_->log()) {
      std::vector<std::string> reads;
      append_alive(reads, microbatch.gradients);
      log->work(lanes_->compute().id(), "sum of gradients", std::move(reads), {});
    }
  }
}

}  // namespace pp_runtime
