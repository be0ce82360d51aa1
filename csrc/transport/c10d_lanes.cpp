#include "precompiled.h"

#include "transport/c10d_lanes.h"

#include <Python.h>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>

#include <chrono>
#include <stdexcept>
#include <thread>
#include <utility>

namespace pp_runtime {

namespace {

constexpr std::chrono::microseconds kPause{20};

/// Gives up the GIL where the calling thread has it: the end of a process group waits for threads that may need it.
class WithoutGil {
 public:
  WithoutGil() : state_(Py_IsInitialized() != 0 && PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() {
    if (state_ != nullptr) {
      PyEval_RestoreThread(state_);
    }
  }

 private:
  PyThreadState* state_;
};

/// Work that a process group queues while `lane` is current waits for the lane, and the lane for it.
/// A recorded device's group works on the host, so there the host waits when it needs the work's end.
void queue_on(const Lanes& lanes, const c10::intrusive_ptr<c10d::Work>& work) {
  if (lanes.log() == nullptr) {
    work->wait();
  }
}

/// Waits until the device comes to `mark`, before a channel closes. False where it never does, as a rank failed: then
/// the communicator is aborted, so that nothing else of this process waits for it.
bool comes_to(const LanePath& on_device, const MarkPointer& mark, Watch& watch) noexcept {
  if (on_device.lanes->log() != nullptr) {
    return false;
  }
  try {
    const auto since = Watch::Clock::now();
    for (auto looked = since; !mark->passed(); std::this_thread::sleep_for(kPause)) {
      if (Watch::Clock::now() - looked > Watch::kInterval) {
        looked = Watch::Clock::now();
        watch.look_for_failure(since);
      }
    }
    return true;
  } catch (const std::exception&) {
    // A rank failed, or the device itself.
  }
  try {
    if (on_device.owned) {
      on_device.communicator->abort();
    }
  } catch (const std::exception&) {
    // It is past aborting.
  }
  return false;
}

}  // namespace

LaneSendChannel::LaneSendChannel(C10dPath path, LanePath on_device, std::shared_ptr<Watch> watch,
                                 std::shared_ptr<WaitGuard> guard)
    : C10dSendChannel(std::move(path), std::move(watch), std::move(guard)),
      on_device_(std::move(on_device)),
      lane_(on_device_.lanes->make("send, " + this->path().name)),
      slots_(std::make_shared<SlotPool>(on_device_.lanes, this->path().name + ", sender", this->path().device, lane_,
                                        SlotPool::Readers::kNone, on_device_.slots)) {}

LaneSendChannel::~LaneSendChannel() {
  const WithoutGil no_gil;
  if (!on_their_way_.empty() && !comes_to(on_device_, on_their_way_.back().sent, watch())) {
    // Nobody received it, as a step failed; somebody may read the memory for as long as the process lives.
    new std::deque<OnItsWay>(std::move(on_their_way_));
  }
  on_their_way_.clear();
  on_device_.communicator.reset();
}

void LaneSendChannel::drop_tensors(OnItsWay& message) {
  if (message.tensors.empty()) {
    return;
  }
  message.tensors.clear();
  if (LaneLog* log = on_device_.lanes->log()) {
    // Whatever the compute lane allocates next may lie there.
    log->work(on_device_.lanes->compute().id(), "reuse of memory", {}, {message.buffer});
  }
}

void LaneSendChannel::drop_oldest() {
  OnItsWay& oldest = on_their_way_.front();
  if (on_device_.lanes->log() != nullptr) {
    guard().wait(oldest.work, path().peer);
  }
  drop_tensors(oldest);
  on_their_way_.pop_front();
}

void LaneSendChannel::drop_sent(size_t most) {
  while (!on_their_way_.empty() && on_their_way_.front().sent->passed()) {
    drop_oldest();
  }
  while (on_their_way_.size() > most) {
    const auto since = Watch::Clock::now();
    for (auto looked = since; !on_their_way_.front().sent->passed(); std::this_thread::sleep_for(kPause)) {
      if (Watch::Clock::now() - looked > Watch::kInterval) {
        looked = Watch::Clock::now();
        watch().look(since);
      }
    }
    drop_oldest();
  }
}

void LaneSendChannel::send_payload(Message message, const MessageSpec& spec) {
  if (!message.lane) {
    throw std::logic_error("channel " + path().name + ": a message has no lane");
  }
  drop_sent(on_device_.slots - 1);
  const Lanes& lanes = *on_device_.lanes;
  const auto slot = slots_->take(spec.payload_bytes);
  const c10::StreamGuard on(lane_);
  message.lane->ready->hold_back(lane_);
  const at::Tensor memory = slot->memory().narrow(0, 0, static_cast<int64_t>(spec.payload_bytes));
  {
    const at::NoGradGuard no_grad;
    const std::vector<at::Tensor> places = unpack(memory, 0, spec, nullptr);
    for (size_t i = 0; i < places.size(); ++i) {
      if (places[i].defined()) {
        places[i].copy_(message.tensors[i], /*non_blocking=*/true);
      }
    }
  }
  if (LaneLog* log = lanes.log()) {
    log->work(lane_.id(), "copy for " + path().name, {message.lane->buffer}, {slot->name()});
  }
  auto copied = lanes.mark(lane_);
  std::vector<at::Tensor> buffers = {memory};
  auto work = on_device_.communicator->send(buffers, on_device_.peer, path().tag + 1);
  queue_on(lanes, work);
  if (LaneLog* log = lanes.log()) {
    log->work(lane_.id(), "send over " + path().name, {slot->name()}, {});
  }
  on_their_way_.push_back({.work = std::move(work),
                           .tensors = std::move(message.tensors),
                           .slot = slot,
                           .copied = std::move(copied),
                           .sent = lanes.mark(lane_),
                           .buffer = message.lane->buffer});
}

void LaneSendChannel::finish_step() {
  C10dSendChannel::finish_step();
  drop_sent(on_device_.slots);
  if (!on_their_way_.empty()) {
    // An output may be a parameter or the user's own input, which are written after the step.
    on_their_way_.back().copied->hold_back(on_device_.lanes->compute());
    for (OnItsWay& message : on_their_way_) {
      drop_tensors(message);
    }
  }
}

LaneReceiveChannel::LaneReceiveChannel(C10dPath path, LanePath on_device, std::shared_ptr<Watch> watch,
                                       std::shared_ptr<WaitGuard> guard)
    : C10dReceiveChannel(std::move(path), std::move(watch), std::move(guard)),
      on_device_(std::move(on_device)),
      lane_(on_device_.lanes->make("receive, " + this->path().name)),
      slots_(std::make_shared<SlotPool>(on_device_.lanes, this->path().name + ", receiver", this->path().device, lane_,
                                        SlotPool::Readers::kCompute, on_device_.slots)) {}

LaneReceiveChannel::~LaneReceiveChannel() {
  const WithoutGil no_gil;
  if (last_arrival_) {
    comes_to(on_device_, last_arrival_, watch());
  }
  on_device_.communicator.reset();
}

void LaneReceiveChannel::receive_payload(Message& message, const MessageSpec& spec) {
  if (spec.payload_bytes == 0) {
    const auto nothing = at::empty({0}, at::TensorOptions(at::kByte).device(path().device));
    message.tensors = unpack(nothing, 0, spec, nullptr);
    return;
  }
  const Lanes& lanes = *on_device_.lanes;
  const std::shared_ptr<SlotPool::Lease> slot = slots_->take(spec.payload_bytes);
  const at::Tensor memory = slot->memory().narrow(0, 0, static_cast<int64_t>(spec.payload_bytes));
  {
    const c10::StreamGuard on(lane_);
    std::vector<at::Tensor> buffers = {memory};
    const auto work = on_device_.communicator->recv(buffers, on_device_.peer, path().tag + 1);
    if (LaneLog* log = lanes.log()) {
      guard().wait(work, path().peer);
      log->work(lane_.id(), "receive over " + path().name, {}, {slot->name()});
    }
    queue_on(lanes, work);
  }
  message.tensors = unpack(memory, 0, spec, slot);
  last_arrival_ = lanes.mark(lane_);
  message.lane = std::make_shared<LaneTicket>(LaneTicket{.ready = last_arrival_, .buffer = slot->name(), .slot = slot});
}

}  // namespace pp_runtime
