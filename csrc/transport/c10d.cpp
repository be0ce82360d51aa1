#include "precompiled.h"

#include "transport/c10d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <utility>

namespace pp_runtime {

namespace {

/// Receives posted ahead of need: at most so many, and no more than so many bytes where that leaves two.
constexpr size_t kAhead = 32;
constexpr size_t kBytesAhead = 1 << 20;
/// A sender waits for nobody while it has no more than this under way, also where the plan could do with less.
constexpr size_t kSendsInFlight = 8;
/// Seconds; a rank that waits for the end of a step looks longer than that before it gives up.
constexpr double kLongStep = 0.4;

struct BlockHead {
  uint32_t description_bytes;
  /// Where the description is too long for the block, it comes whole in a message of its own.
  uint8_t description_follows;
  uint8_t payload_inside;
};

at::Tensor bytes_on_host(size_t bytes) { return at::empty({static_cast<int64_t>(bytes)}, at::kByte); }

char* data(const at::Tensor& buffer) { return static_cast<char*>(buffer.mutable_data_ptr()); }

/// Where the tensors begin in a block.
size_t payload_at(size_t description_bytes) {
  return align_up(sizeof(BlockHead) + description_bytes, kPayloadAlignment);
}

/// A pending operation may still be written to by the backend's thread, so what it uses is kept for the process's life.
template <typename Pending>
void keep_for_ever(Pending& pending) {
  static std::mutex mutex;
  static auto* kept = new std::vector<std::pair<c10::intrusive_ptr<c10d::Work>, at::Tensor>>();
  const std::lock_guard lock(mutex);
  for (auto& operation : pending) {
    kept->emplace_back(std::move(operation.work), std::move(operation.buffer));
  }
  pending.clear();
}

/// A buffer of the host as the holder of the tensors that lie in it.
std::shared_ptr<void> holder_of(const at::Tensor& buffer) { return std::make_shared<at::Tensor>(buffer); }

}  // namespace

void BlockSize::saw(size_t needed) { largest_needed_ = std::max(largest_needed_.value_or(0), needed); }

void BlockSize::next_step() {
  if (largest_needed_) {
    const size_t needed = *std::exchange(largest_needed_, std::nullopt);
    bytes_ = needed > kLargest ? kFirst : std::max(align_up(needed, kFirst), kFirst);
  }
}

C10dSendChannel::C10dSendChannel(C10dPath path, std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard)
    : path_(std::move(path)), watch_(std::move(watch)), guard_(std::move(guard)) {}

C10dSendChannel::~C10dSendChannel() { keep_for_ever(in_flight_); }

void C10dSendChannel::post(at::Tensor buffer, int tag) {
  std::vector<at::Tensor> buffers = {buffer};
  const bool begins = tag == path_.tag;
  in_flight_.push_back({.work = guard_->post(path_.peer, [&] { return path_.group->send(buffers, path_.peer, tag); }),
                        .buffer = std::move(buffer),
                        .begins_message = begins});
  messages_in_flight_ += begins ? 1 : 0;
}

/// Waits until no more than `keep` messages are under way; of a message that is, all parts are.
void C10dSendChannel::reap(size_t keep) {
  while (messages_in_flight_ > keep || (!in_flight_.empty() && !in_flight_.front().begins_message)) {
    guard_->wait(in_flight_.front().work, path_.peer);
    messages_in_flight_ -= in_flight_.front().begins_message ? 1 : 0;
    in_flight_.pop_front();
  }
}

void C10dSendChannel::send(Message message) {
  const MessageSpec spec = MessageSpec::of(message);
  const std::string description = spec.encode();
  const size_t needed = payload_at(description.size()) + spec.payload_bytes;
  const bool inside = needed <= block_size_.bytes();
  const bool follows = sizeof(BlockHead) + description.size() > block_size_.bytes();
  block_size_.saw(needed);
  at::Tensor block = bytes_on_host(block_size_.bytes());
  const BlockHead head = {.description_bytes = static_cast<uint32_t>(description.size()),
                          .description_follows = static_cast<uint8_t>(follows),
                          .payload_inside = static_cast<uint8_t>(inside)};
  std::memcpy(data(block), &head, sizeof(head));
  if (!follows) {
    std::memcpy(data(block) + sizeof(head), description.data(), description.size());
  }
  if (inside) {
    pack(message, spec, data(block) + payload_at(description.size()));
  }
  reap(std::max(path_.ahead, kSendsInFlight) - 1);
  post(std::move(block), path_.tag);
  if (follows) {
    at::Tensor whole = bytes_on_host(description.size());
    std::memcpy(data(whole), description.data(), description.size());
    post(std::move(whole), path_.tag + 1);
  }
  if (!inside && spec.payload_bytes > 0) {
    send_payload(message, spec);
  }
}

void C10dSendChannel::send_payload(const Message& message, const MessageSpec& spec) {
  at::Tensor buffer = bytes_on_host(spec.payload_bytes);
  pack(message, spec, data(buffer));
  post(std::move(buffer), path_.tag + 1);
}

void C10dSendChannel::finish_step() {
  reap(0);
  block_size_.next_step();
}

C10dReceiveChannel::C10dReceiveChannel(C10dPath path, std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard)
    : path_(std::move(path)), watch_(std::move(watch)), guard_(std::move(guard)) {}

C10dReceiveChannel::~C10dReceiveChannel() { keep_for_ever(posted_); }

void C10dReceiveChannel::begin_step(size_t messages) {
  block_size_.next_step();
  to_post_ = messages;
  post_ahead();
}

void C10dReceiveChannel::post_ahead() {
  const size_t most = std::clamp<size_t>(kBytesAhead / block_size_.bytes(), 2, kAhead);
  while (to_post_ > 0 && posted_.size() < most) {
    at::Tensor block = bytes_on_host(block_size_.bytes());
    std::vector<at::Tensor> buffers = {block};
    posted_.push_back(
        {.work = guard_->post(path_.peer, [&] { return path_.group->recv(buffers, path_.peer, path_.tag); }),
         .buffer = std::move(block)});
    --to_post_;
  }
}

Message C10dReceiveChannel::receive() {
  if (posted_.empty()) {
    throw std::logic_error("channel " + path_.name + ": more messages were asked for than the step has");
  }
  guard_->wait(posted_.front().work, path_.peer);
  const at::Tensor block = std::move(posted_.front().buffer);
  posted_.pop_front();
  post_ahead();
  BlockHead head = {};
  std::memcpy(&head, data(block), sizeof(head));
  at::Tensor whole;
  const char* description = data(block) + sizeof(head);
  if (head.description_follows != 0) {
    whole = receive_more(head.description_bytes);
    description = data(whole);
  } else if (sizeof(head) + head.description_bytes > block_size_.bytes()) {
    throw std::runtime_error("channel " + path_.name + ": a message's description is longer than its block");
  }
  MessageSpec spec = MessageSpec::decode(description, head.description_bytes);
  const size_t needed = payload_at(head.description_bytes) + spec.payload_bytes;
  block_size_.saw(needed);
  Message message = spec.take_message();
  if (head.payload_inside != 0) {
    if (needed > block_size_.bytes()) {
      throw std::runtime_error("channel " + path_.name + ": a message's tensors lie outside its block");
    }
    message.tensors = unpack(block, payload_at(head.description_bytes), spec, holder_of(block));
  } else {
    receive_payload(message, spec);
  }
  return message;
}

at::Tensor C10dReceiveChannel::receive_more(size_t bytes) {
  std::vector<at::Tensor> buffers = {bytes_on_host(bytes)};
  guard_->wait(guard_->post(path_.peer, [&] { return path_.group->recv(buffers, path_.peer, path_.tag + 1); }),
               path_.peer);
  return buffers[0];
}

void C10dReceiveChannel::receive_payload(Message& message, const MessageSpec& spec) {
  const at::Tensor buffer = spec.payload_bytes > 0 ? receive_more(spec.payload_bytes) : bytes_on_host(0);
  message.tensors = unpack(buffer, 0, spec, holder_of(buffer));
}

C10dConfirmation::C10dConfirmation(C10dPath path, int ranks, int own_rank, std::shared_ptr<WaitGuard> guard)
    : path_(std::move(path)), ranks_(ranks), own_rank_(own_rank), guard_(std::move(guard)) {}

void C10dConfirmation::send(int peer) {
  std::vector<at::Tensor> word = {at::zeros({1}, at::kByte)};
  guard_->wait(guard_->post(peer, [&] { return path_.group->send(word, peer, path_.tag); }), peer);
}

void C10dConfirmation::receive(int peer) {
  std::vector<at::Tensor> word = {at::zeros({1}, at::kByte)};
  guard_->wait(guard_->post(peer, [&] { return path_.group->recv(word, peer, path_.tag); }), peer);
}

void C10dConfirmation::confirm() {
  if (own_rank_ != 0) {
    send(0);
    receive(0);
    return;
  }
  for (int rank = 1; rank < ranks_; ++rank) {
    receive(rank);
  }
  const std::chrono::duration<double> taken = Watch::Clock::now() - last_;
  if (taken.count() > std::min(kLongStep, guard_->watch().deadline() / 2)) {
    guard_->watch().look_for_failure(Watch::Clock::now());
  }
  for (int rank = 1; rank < ranks_; ++rank) {
    send(rank);
  }
  last_ = Watch::Clock::now();
}

}  // namespace pp_runtime
