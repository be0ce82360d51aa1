#include "precompiled.h"

#include "transport/communicator_channel.h"

#include <Python.h>

#include <deque>
#include <utility>
#include <vector>

namespace pp_runtime {

namespace {

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

/// Waits until the device comes to `mark`. Where it never does the communicator is aborted, so that nothing else of
/// this process waits for it.
bool ends(const CommunicatorPath& path, const MarkPointer& mark, Watch& watch) noexcept {
  if (path.lanes->log() != nullptr) {
    return false;
  }
  if (comes_to(*path.lanes, mark, watch)) {
    return true;
  }
  try {
    if (path.owned) {
      path.communicator->abort();
    }
  } catch (const std::exception&) {
    // It is past aborting.
  }
  return false;
}

}  // namespace

struct CommunicatorSendChannel::Sent {
  c10::intrusive_ptr<c10d::Work> work;
  std::shared_ptr<SlotPool::Lease> slot;
};

CommunicatorSendChannel::CommunicatorSendChannel(std::shared_ptr<SendChannel> host, CommunicatorPath path,
                                                 std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard)
    : LaneSendChannel(std::move(host), path.lanes, path.name, path.slots, std::move(watch)),
      path_(std::move(path)),
      guard_(std::move(guard)),
      slots_(std::make_shared<SlotPool>(path_.lanes, name() + ", sender", path_.memory, lane(),
                                        SlotPool::Readers::kNone, path_.slots)) {}

CommunicatorSendChannel::~CommunicatorSendChannel() {
  const WithoutGil no_gil;
  std::deque<OnItsWay> left = take_on_their_way();
  if (!left.empty() && !ends(path_, left.back().done, watch())) {
    // Nobody received it, as a step failed; somebody may read the memory for as long as the process lives.
    new std::deque<OnItsWay>(std::move(left));
  }
  left.clear();
  path_.communicator.reset();
}

void CommunicatorSendChannel::ended(OnItsWay& message) {
  if (lanes().log() != nullptr) {
    guard_->wait(static_cast<Sent*>(message.kept.get())->work, peer());
  }
}

std::string CommunicatorSendChannel::carry(const Message& message, const MessageSpec& spec, OnItsWay& on_its_way) {
  const auto slot = slots_->take(spec.payload_bytes);
  const at::Tensor memory = slot->memory().narrow(0, 0, static_cast<int64_t>(spec.payload_bytes));
  copy_into(memory, message, spec);
  if (LaneLog* log = lanes().log()) {
    log->work(lane().id(), "copy for " + name(), {message.lane->buffer}, {slot->name()});
  }
  on_its_way.copied = lanes().mark(lane());
  std::vector<at::Tensor> buffers = {memory};
  auto work = path_.communicator->send(buffers, path_.peer, path_.tag);
  queue_on(lanes(), work);
  if (LaneLog* log = lanes().log()) {
    log->work(lane().id(), "send over " + name(), {slot->name()}, {});
  }
  on_its_way.kept = std::make_shared<Sent>(Sent{.work = std::move(work), .slot = slot});
  return {};
}

CommunicatorReceiveChannel::CommunicatorReceiveChannel(std::shared_ptr<ReceiveChannel> host, CommunicatorPath path,
                                                       std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard)
    : LaneReceiveChannel(std::move(host), path.lanes, path.name, path.memory, std::move(watch)),
      path_(std::move(path)),
      guard_(std::move(guard)),
      slots_(std::make_shared<SlotPool>(path_.lanes, name() + ", receiver", path_.memory, lane(),
                                        SlotPool::Readers::kCompute, path_.slots)) {}

CommunicatorReceiveChannel::~CommunicatorReceiveChannel() {
  const WithoutGil no_gil;
  if (last_arrival()) {
    ends(path_, last_arrival(), watch());
  }
  path_.communicator.reset();
}

LaneReceiveChannel::Arrived CommunicatorReceiveChannel::arrive(const MessageSpec& spec, const std::string&) {
  const std::shared_ptr<SlotPool::Lease> slot = slots_->take(spec.payload_bytes);
  const at::Tensor memory = slot->memory().narrow(0, 0, static_cast<int64_t>(spec.payload_bytes));
  std::vector<at::Tensor> buffers = {memory};
  const auto work = path_.communicator->recv(buffers, path_.peer, path_.tag);
  if (LaneLog* log = lanes().log()) {
    guard_->wait(work, peer());
    log->work(lane().id(), "receive over " + name(), {}, {slot->name()});
  }
  queue_on(lanes(), work);
  return {.tensors = unpack(memory, 0, spec, slot), .buffer = slot->name(), .slot = slot};
}

}  // namespace pp_runtime
