#pragma once

#include "execution/program.h"
#include "execution/stage.h"
#include "execution/step_lanes.h"
#include "execution/step_values.h"
#include "lanes/lanes.h"
#include "oversight/watch.h"
#include "oversight/whereabouts.h"
#include "transport/confirmation.h"
#include "transport/transport.h"

#include <pybind11/pytypes.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace pp_runtime {

/// One action as it ran. `waited` is the part spent waiting for a message or a credit.
/// On lanes these are moments of the lanes' clock until `take_trace` makes times of them.
struct TraceRecord {
  uint32_t instruction;
  int64_t start_ns;
  int64_t end_ns;
  int64_t waited_ns;
};

/// What a step took on this rank, kept of every step. Times are the host's: of a CPU's step all there is, of an
/// accelerator's only how long it took to queue.
struct StepTotals {
  bool training = false;
  /// From the first action until every rank had ended the step.
  int64_t step_ns = 0;
  /// In forwards, backwards and what stands for them.
  int64_t compute_ns = 0;
  /// For messages, for room to send, and for the other ranks to end the step.
  int64_t waited_ns = 0;
  /// Of tensors, without what describes them.
  uint64_t sent_bytes = 0;
  uint64_t received_bytes = 0;
};

/// Runs a rank's program.
///
/// Owns the program and the channels; shares the stages with Python. `run` is called with the GIL on the thread of
/// `schedule.step` and gives it up at once; it is taken again for the user's own code only. When it throws, `position`
/// tells the instruction that failed.
class Executor {
 public:
  Executor(const std::vector<int32_t>& program, std::vector<std::shared_ptr<Stage>> stages, std::vector<Edge> edges,
           std::vector<std::shared_ptr<SendChannel>> send_channels,
           std::vector<std::shared_ptr<ReceiveChannel>> receive_channels, std::vector<pybind11::object> callbacks,
           std::vector<std::string> callback_names, size_t microbatches, std::shared_ptr<Confirmation> confirmation,
           std::shared_ptr<Board> board, std::shared_ptr<Lanes> lanes, std::shared_ptr<const Watch> watch);

  /// GIL held. The number of this step is the same on every rank: it is part of every message.
  void run(StepInput input, uint64_t step);

  /// The loss of a microbatch from the last stage's output; keeps both as `run` will return them. GIL held.
  pybind11::object compute_loss(int64_t stage, size_t microbatch, const pybind11::object& output);

  /// What `run` gathered.
  pybind11::list take_outputs() { return values_.take_outputs(); }
  pybind11::list take_losses() { return values_.take_losses(); }

  int64_t position() const { return position_; }
  std::string text_of(size_t instruction) const;
  const std::vector<Instruction>& program() const { return program_; }
  int64_t stage_index_of(size_t instruction) const;

  /// Of the last step that ended.
  const StepTotals& totals() const { return totals_; }
  /// How long the last step took on the compute lane, which is waited for; nothing on a CPU. No GIL.
  std::optional<double> lane_seconds() const;

  void set_recording(bool on);
  std::vector<TraceRecord> take_trace();

  /// Drops what a failed step left in the stages.
  void clear();

 private:
  void execute(const Instruction& instruction);
  /// The instructions, one after the other.
  void run_program();
  std::chrono::nanoseconds waited() const;
  Message receive(const Instruction& instruction);
  void send(const Instruction& instruction, Message message);
  /// One action with what it waits for on the device, and its moments there where they are recorded.
  void run_on_lanes(size_t instruction);
  Activity activity_of(const Instruction& instruction) const;
  void show_on_board(size_t instruction, int64_t now);
  void show_on_board(int32_t operation);

  std::vector<Instruction> program_;
  std::vector<std::shared_ptr<Stage>> stages_;
  std::vector<Edge> edges_;
  std::vector<std::shared_ptr<SendChannel>> send_channels_;
  std::vector<std::shared_ptr<ReceiveChannel>> receive_channels_;
  std::vector<size_t> messages_of_channel_;
  std::vector<pybind11::object> callbacks_;
  std::vector<std::string> callback_names_;
  size_t microbatches_;
  /// Null where this is the only rank.
  std::shared_ptr<Confirmation> confirmation_;
  /// Null on a CPU.
  std::unique_ptr<StepLanes> lanes_;
  std::unique_ptr<LaneClock> clock_;
  std::unique_ptr<LaneStopwatch> stopwatch_;
  std::shared_ptr<Board> board_;
  /// Knows how long this rank has waited. Null where this is the only rank.
  std::shared_ptr<const Watch> watch_;
  std::vector<Activity> activities_;

  StepValues values_;
  uint64_t step_ = 0;
  int64_t position_ = -1;
  StepTotals totals_;
  bool recording_ = false;
  std::vector<TraceRecord> trace_;
};

}  // namespace pp_runtime
