#include "precompiled.h"

#include "execution/executor.h"

#include "oversight/signals.h"

#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <pybind11/cast.h>
#include <pybind11/gil.h>

#include <chrono>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace pp_runtime {

namespace {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

uint64_t bytes_of(const Message& message) {
  uint64_t bytes = 0;
  for (const at::Tensor& tensor : message.tensors) {
    bytes += tensor.defined() ? tensor.nbytes() : 0;
  }
  return bytes;
}

std::string describe(const Frame& frame) {
  return std::string(frame.training != 0 ? "step" : "eval") + " number " + std::to_string(frame.step) +
         ", microbatch " + std::to_string(frame.microbatch);
}

}  // namespace

Executor::Executor(const std::vector<int32_t>& program, std::vector<std::shared_ptr<Stage>> stages,
                   std::vector<Edge> edges, std::vector<std::shared_ptr<SendChannel>> send_channels,
                   std::vector<std::shared_ptr<ReceiveChannel>> receive_channels, std::vector<py::object> callbacks,
                   std::vector<std::string> callback_names, size_t microbatches,
                   std::shared_ptr<Confirmation> confirmation, std::shared_ptr<Board> board,
                   std::shared_ptr<Lanes> lanes, std::shared_ptr<const Watch> watch)
    : program_(read_program(program, {.stages = stages.size(),
                                      .microbatches = microbatches,
                                      .edges = edges.size(),
                                      .send_channels = send_channels.size(),
                                      .receive_channels = receive_channels.size(),
                                      .callbacks = callbacks.size()})),
      stages_(std::move(stages)),
      edges_(std::move(edges)),
      send_channels_(std::move(send_channels)),
      receive_channels_(std::move(receive_channels)),
      messages_of_channel_(receive_channels_.size()),
      callbacks_(std::move(callbacks)),
      callback_names_(std::move(callback_names)),
      microbatches_(microbatches),
      confirmation_(std::move(confirmation)),
      board_(std::move(board)),
      watch_(std::move(watch)) {
  for (const Instruction& instruction : program_) {
    activities_.push_back(activity_of(instruction));
    if (is_receive(instruction.operation)) {
      ++messages_of_channel_[instruction.channel];
    }
  }
  if (lanes) {
    std::vector<int64_t> indices;
    for (const auto& stage : stages_) {
      indices.push_back(stage->index());
    }
    clock_ = std::make_unique<LaneClock>(lanes);
    stopwatch_ = std::make_unique<LaneStopwatch>(lanes);
    lanes_ = std::make_unique<StepLanes>(std::move(lanes), program_, std::move(indices), microbatches_);
  }
}

void Executor::run(StepInput input, uint64_t step) {
  values_.begin(std::move(input), microbatches_);
  step_ = step;
  trace_.clear();
  position_ = -1;
  totals_ = {.training = values_.training()};
  {
    py::gil_scoped_release no_gil;
    const int64_t began = now_ns();
    const std::chrono::nanoseconds waited_before = waited();
    const at::AutoGradMode mode(values_.training());
    for (const auto& stage : stages_) {
      stage->begin_step(microbatches_, values_.training(), step);
    }
    if (lanes_) {
      lanes_->begin_step(step);
      if (recording_) {
        clock_->begin();
      }
    }
    for (size_t i = 0; i < receive_channels_.size(); ++i) {
      receive_channels_[i]->begin_step(messages_of_channel_[i]);
    }
    run_program();
    position_ = -1;
    show_on_board(kEndOfStep);
    // What came while the last actions ran must stop the step on every rank, not only on this one.
    check_signals();
    for (const auto& channel : send_channels_) {
      channel->finish_step();
    }
    if (confirmation_) {
      confirmation_->confirm();
    }
    totals_.step_ns = now_ns() - began;
    totals_.waited_ns = (waited() - waited_before).count();
    for (const auto& stage : stages_) {
      stage->clear();
    }
  }
  position_ = -1;
  values_.drop_input();
  show_on_board(kOutsideStep);
}

void Executor::run_program() {
  if (lanes_) {
    stopwatch_->start();
  }
  // An action lasts until the next one begins, so that one look at the clock an action is enough.
  int64_t since = 0;
  bool computes = false;
  const auto next = [&](bool next_computes) {
    const int64_t now = now_ns();
    totals_.compute_ns += computes ? now - since : 0;
    computes = next_computes;
    return since = now;
  };
  for (size_t i = 0; i < program_.size(); ++i) {
    if (program_[i].only_data_parallel && !stages_[program_[i].stage]->is_data_parallel()) {
      continue;
    }
    position_ = static_cast<int64_t>(i);
    at::RecordFunction range(at::RecordScope::USER_SCOPE);
    if (range.isActive()) {
      range.before("PP:" + text_of(i));
    }
    const int64_t start = next(program_[i].computes);
    show_on_board(i, start);
    if (lanes_) {
      run_on_lanes(i);
      continue;
    }
    const std::chrono::nanoseconds waited_before = waited();
    execute(program_[i]);
    if (recording_) {
      trace_.push_back({.instruction = static_cast<uint32_t>(i),
                        .start_ns = start,
                        .end_ns = now_ns(),
                        .waited_ns = (waited() - waited_before).count()});
    }
  }
  next(false);
  if (lanes_) {
    stopwatch_->stop();
  }
}

std::chrono::nanoseconds Executor::waited() const { return watch_ ? watch_->waited() : std::chrono::nanoseconds(0); }

std::optional<double> Executor::lane_seconds() const {
  return stopwatch_ ? std::optional(stopwatch_->seconds()) : std::nullopt;
}

Activity Executor::activity_of(const Instruction& instruction) const {
  Activity activity{.operation = static_cast<int32_t>(instruction.operation),
                    .stage = instruction.stage >= 0 ? static_cast<int32_t>(stages_[instruction.stage]->index()) : -1,
                    .microbatch = instruction.microbatch};
  if (is_send(instruction.operation)) {
    activity.peer = send_channels_[instruction.channel]->peer();
  } else if (is_receive(instruction.operation)) {
    activity.peer = receive_channels_[instruction.channel]->peer();
  } else {
    return activity;
  }
  const Edge& edge = edges_[instruction.edge];
  activity.other_stage = static_cast<int32_t>(edge.source == activity.stage ? edge.destination : edge.source);
  return activity;
}

void Executor::show_on_board(size_t instruction, int64_t now) {
  if (!board_) {
    return;
  }
  if (program_[instruction].operation == Operation::kCall) {
    board_->begin_call(callback_names_.at(program_[instruction].callback), activities_[instruction],
                       std::chrono::nanoseconds(now));
  } else {
    board_->begin(activities_[instruction], std::chrono::nanoseconds(now));
  }
}

void Executor::show_on_board(int32_t operation) {
  if (board_) {
    board_->begin({.operation = operation});
  }
}

void Executor::run_on_lanes(size_t instruction) {
  const auto moment = [this] { return recording_ ? static_cast<int64_t>(clock_->moment()) : 0; };
  const int64_t start = moment();
  lanes_->before(program_[instruction], lanes_->logs() ? text_of(instruction) : std::string());
  const int64_t begun = moment();
  execute(program_[instruction]);
  lanes_->after(program_[instruction]);
  const int64_t end = moment();
  if (recording_) {
    trace_.push_back(
        {.instruction = static_cast<uint32_t>(instruction), .start_ns = start, .end_ns = end, .waited_ns = begun});
  }
}

void Executor::send(const Instruction& instruction, Message message) {
  if (lanes_) {
    lanes_->sending(instruction, message);
  }
  totals_.sent_bytes += bytes_of(message);
  send_channels_[instruction.channel]->send(std::move(message));
}

Message Executor::receive(const Instruction& instruction) {
  Message message = receive_channels_[instruction.channel]->receive();
  const Frame expected = {.step = step_,
                          .microbatch = static_cast<uint32_t>(instruction.microbatch),
                          .training = values_.training() ? 1U : 0U};
  if (!(message.frame == expected)) {
    throw std::runtime_error("this rank is in " + describe(expected) + ", but the message that came is of " +
                             describe(message.frame) + ": call step() or eval() on every rank alike");
  }
  totals_.received_bytes += bytes_of(message);
  if (lanes_) {
    lanes_->received(instruction, message);
  }
  return message;
}

void Executor::execute(const Instruction& instruction) {
  if (instruction.operation == Operation::kCall) {
    py::gil_scoped_acquire gil;
    callbacks_[instruction.callback]();
    return;
  }
  Stage& stage = *stages_[instruction.stage];
  const size_t microbatch = instruction.microbatch;
  switch (instruction.operation) {
    case Operation::kForward: {
      py::gil_scoped_acquire gil;
      values_.forward(stage, microbatch);
      break;
    }
    case Operation::kBackward:
      stage.backward(microbatch, BackwardKind::kFull, instruction.last);
      break;
    case Operation::kInputBackward:
      stage.backward(microbatch, BackwardKind::kInput, instruction.last);
      break;
    case Operation::kWeightBackward:
      stage.backward(microbatch, BackwardKind::kWeight, instruction.last);
      break;
    case Operation::kSendForward:
      send(instruction, stage.activation(edges_[instruction.edge], microbatch));
      break;
    case Operation::kReceiveForward:
      stage.accept_activation(edges_[instruction.edge], microbatch, receive(instruction));
      break;
    case Operation::kSendBackward:
      send(instruction, stage.input_gradients(edges_[instruction.edge], microbatch));
      break;
    case Operation::kReceiveBackward:
      stage.accept_gradient(edges_[instruction.edge], microbatch, receive(instruction));
      break;
    case Operation::kHandForward:
      stages_[instruction.channel]->accept_activation(edges_[instruction.edge], microbatch,
                                                      stage.activation(edges_[instruction.edge], microbatch));
      break;
    case Operation::kHandBackward:
      stages_[instruction.channel]->accept_gradient(edges_[instruction.edge], microbatch,
                                                    stage.input_gradients(edges_[instruction.edge], microbatch));
      break;
    case Operation::kCall:
    case Operation::kCount:
      break;
  }
  if (instruction.releases_outputs) {
    stage.release_outputs(microbatch);
  }
}

py::object Executor::compute_loss(int64_t stage, size_t microbatch, const py::object& output) {
  return values_.compute_loss(*stages_.at(stage), microbatch, output);
}

int64_t Executor::stage_index_of(size_t instruction) const {
  const Instruction& found = program_.at(instruction);
  return found.stage < 0 ? -1 : stages_[found.stage]->index();
}

std::string Executor::text_of(size_t instruction) const {
  const Instruction& found = program_.at(instruction);
  if (found.operation == Operation::kCall) {
    return callback_names_.at(found.callback);
  }
  return action_text(found.operation, stages_[found.stage]->index(), found.microbatch);
}

void Executor::set_recording(bool on) { recording_ = on; }

std::vector<TraceRecord> Executor::take_trace() {
  auto trace = std::exchange(trace_, {});
  if (lanes_) {
    for (TraceRecord& record : trace) {
      record.start_ns = clock_->host_ns(record.start_ns);
      record.end_ns = clock_->host_ns(record.end_ns);
      record.waited_ns = clock_->host_ns(record.waited_ns) - record.start_ns;
    }
  }
  return trace;
}

void Executor::clear() {
  // First, so that whoever waits for the device below does not wait for a peer.
  for (const auto& channel : send_channels_) {
    channel->abandon();
  }
  for (const auto& channel : receive_channels_) {
    channel->abandon();
  }
  values_.clear();
  for (const auto& stage : stages_) {
    stage->clear();
  }
  show_on_board(kOutsideStep);
}

}  // namespace pp_runtime
