#include "precompiled.h"

#include "transport/lane_channel.h"

#include "transport/peer.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

namespace pp_runtime {

namespace {

constexpr std::chrono::seconds kDrain{10};

/// Looks at the device until it is past `mark`; false where it is not within `limit`.
bool passes_within(std::chrono::nanoseconds limit, const Mark& mark) {
  const auto since = Watch::Clock::now();
  // Short at first, so that little is lost, then longer, so that a core is not.
  std::chrono::microseconds pause{20};
  while (!mark.passed()) {
    if (Watch::Clock::now() - since > limit) {
      return false;
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(2 * pause, std::chrono::microseconds(200));
  }
  return true;
}

char* data(const at::Tensor& buffer) { return static_cast<char*>(buffer.mutable_data_ptr()); }

/// A description as a message of the host: how many bytes `told` has, those, the encoded description.
at::Tensor described(const std::string& told, const std::string& description) {
  const auto told_bytes = static_cast<uint32_t>(told.size());
  at::Tensor bytes =
      at::empty({static_cast<int64_t>(sizeof(told_bytes) + told.size() + description.size())}, at::kByte);
  char* place = data(bytes);
  std::memcpy(place, &told_bytes, sizeof(told_bytes));
  std::memcpy(place + sizeof(told_bytes), told.data(), told.size());
  std::memcpy(place + sizeof(told_bytes) + told.size(), description.data(), description.size());
  return bytes;
}

}  // namespace

bool comes_to(const Lanes& lanes, const MarkPointer& mark, Watch& watch) noexcept {
  if (lanes.log() != nullptr) {
    return false;
  }
  try {
    const auto since = Watch::Clock::now();
    while (!passes_within(Watch::kInterval, *mark)) {
      if (watch.ended()) {
        return false;
      }
      watch.look_for_failure(since);
    }
    return true;
  } catch (const std::exception&) {
    return false;  // a rank failed, or the device itself
  }
}

bool drains(const Lanes& lanes, const MarkPointer& mark) noexcept {
  try {
    return lanes.log() != nullptr || passes_within(kDrain, *mark);
  } catch (const std::exception&) {
    return false;
  }
}

LaneSendChannel::LaneSendChannel(std::shared_ptr<SendChannel> host, std::shared_ptr<Lanes> lanes, std::string name,
                                 size_t most, std::shared_ptr<Watch> watch)
    : host_(std::move(host)),
      lanes_(std::move(lanes)),
      name_(std::move(name)),
      lane_(lanes_->make("send, " + name_)),
      most_(most),
      watch_(std::move(watch)) {}

void LaneSendChannel::drop_tensors(OnItsWay& message) {
  if (message.tensors.empty()) {
    return;
  }
  message.tensors.clear();
  if (LaneLog* log = lanes_->log()) {
    // Whatever the compute lane allocates next may lie there.
    log->work(lanes_->compute().id(), "reuse of memory", {}, {message.buffer});
  }
}

void LaneSendChannel::drop_oldest() {
  OnItsWay& oldest = on_their_way_.front();
  ended(oldest);
  drop_tensors(oldest);
  on_their_way_.pop_front();
}

void LaneSendChannel::drop_done(size_t most) {
  while (!on_their_way_.empty() && on_their_way_.front().done->passed()) {
    drop_oldest();
  }
  while (on_their_way_.size() > most) {
    const Mark& done = *on_their_way_.front().done;
    wait_for_peers(
        *watch_, SpinTime{}, [&] { return done.passed(); },
        [&](std::chrono::nanoseconds) { passes_within(Watch::kInterval, done); });
    drop_oldest();
  }
}

void LaneSendChannel::copy_into(const at::Tensor& memory, const Message& message, const MessageSpec& spec) const {
  message.lane->ready->hold_back(lane_);
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> places = unpack(memory, 0, spec, nullptr);
  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i].defined()) {
      places[i].copy_(message.tensors[i], /*non_blocking=*/true);
    }
  }
}

void LaneSendChannel::send(Message message) {
  const MessageSpec spec = MessageSpec::of(message);
  std::string told;
  if (spec.payload_bytes > 0) {
    if (!message.lane) {
      throw std::logic_error("channel " + name_ + ": a message has no lane");
    }
    drop_done(most_ - 1);
    const c10::StreamGuard on(lane_);
    OnItsWay on_its_way{.tensors = {}, .buffer = message.lane->buffer, .copied = {}, .done = {}, .kept = {}};
    told = carry(message, spec, on_its_way);
    on_its_way.tensors = std::move(message.tensors);
    on_its_way.done = lanes_->mark(lane_);
    if (!on_its_way.copied) {
      on_its_way.copied = on_its_way.done;
    }
    on_their_way_.push_back(std::move(on_its_way));
  }
  // Only now: who has the description may queue a wait for what was queued above.
  host_->send(
      {.frame = message.frame, .tensors = {described(told, spec.encode())}, .requires_grad = {0}, .structure = {}});
}

void LaneSendChannel::finish_step() {
  host_->finish_step();
  drop_done(most_);
  if (!on_their_way_.empty()) {
    // An output may be a parameter or the user's own input, which are written after the step.
    on_their_way_.back().copied->hold_back(lanes_->compute());
    for (OnItsWay& message : on_their_way_) {
      drop_tensors(message);
    }
  }
}

LaneReceiveChannel::LaneReceiveChannel(std::shared_ptr<ReceiveChannel> host, std::shared_ptr<Lanes> lanes,
                                       std::string name, at::Device memory, std::shared_ptr<Watch> watch)
    : host_(std::move(host)),
      lanes_(std::move(lanes)),
      name_(std::move(name)),
      memory_(memory),
      lane_(lanes_->make("receive, " + name_)),
      watch_(std::move(watch)) {}

Message LaneReceiveChannel::receive() {
  const Message described = host_->receive();
  const auto broken = [this] {
    return std::runtime_error("channel " + name_ + ": what came is no description of a message");
  };
  if (described.tensors.size() != 1 || !described.tensors[0].defined() ||
      described.tensors[0].scalar_type() != at::kByte || !described.tensors[0].is_contiguous()) {
    throw broken();
  }
  const char* bytes = data(described.tensors[0]);
  const auto size = static_cast<size_t>(described.tensors[0].numel());
  uint32_t told_bytes = 0;
  if (size < sizeof(told_bytes)) {
    throw broken();
  }
  std::memcpy(&told_bytes, bytes, sizeof(told_bytes));
  if (told_bytes > size - sizeof(told_bytes)) {
    throw broken();
  }
  const std::string told(bytes + sizeof(told_bytes), told_bytes);
  const size_t begin = sizeof(told_bytes) + told_bytes;
  MessageSpec spec = MessageSpec::decode(bytes + begin, size - begin);
  Message message = spec.take_message();
  if (spec.payload_bytes == 0) {
    message.tensors = unpack(at::empty({0}, at::TensorOptions(at::kByte).device(memory_)), 0, spec, nullptr);
    return message;
  }
  const c10::StreamGuard on(lane_);
  Arrived arrived = arrive(spec, told);
  message.tensors = std::move(arrived.tensors);
  last_arrival_ = lanes_->mark(lane_);
  message.lane = std::make_shared<LaneTicket>(
      LaneTicket{.ready = last_arrival_, .buffer = std::move(arrived.buffer), .slot = std::move(arrived.slot)});
  return message;
}

}  // namespace pp_runtime
