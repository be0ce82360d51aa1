#pragma once

#include "transport/confirmation.h"
#include "transport/transport.h"
#include "transport/wait_guard.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace pp_runtime {

/// The size of a channel's blocks, as both of its ends conclude it from the messages of the step before.
class BlockSize {
 public:
  size_t bytes() const { return bytes_; }

  /// A message of this step would take `needed` bytes of a block; 0 where its tensors may not lie in one.
  void saw(size_t needed);
  /// After a step's last message, or before the next one's first. Nothing changes where no message was seen.
  void next_step();

 private:
  static constexpr size_t kFirst = 4096;
  static constexpr size_t kLargest = 16 << 20;

  size_t bytes_ = kFirst;
  std::optional<size_t> largest_needed_;
};

/// The path that both ends of a c10d channel were made for.
struct C10dPath {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  int peer = -1;
  /// Two tags are the channel's own: this one for what describes a message, the next for its tensors.
  int tag = 0;
  std::string name;
  /// How many messages may be under way; with fewer than the plan says, ranks may wait for each other for ever.
  size_t ahead = 0;
};

/// The sending end of a channel through a process group (gloo, NCCL or any other).
///
/// Each message begins with a block on the host whose size both ends know before the step, so the receiver can post its
/// receives before it knows the shapes: in the first step a small one, then what the largest message of the step before
/// would have fitted in. A message that fits lies whole in its block; of others the tensors follow packed into one
/// buffer under the next tag, and are asked for when the block is there. Tensors of other devices go through
/// communicator_channel.h.
class C10dSendChannel final : public SendChannel {
 public:
  C10dSendChannel(C10dPath path, std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard);
  ~C10dSendChannel() override;

  int peer() const override { return path_.peer; }
  void send(Message message) override;
  void finish_step() override;

 private:
  struct Sent {
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor buffer;
    bool begins_message;
  };
  void send_payload(const Message& message, const MessageSpec& spec);
  void post(at::Tensor buffer, int tag);
  void reap(size_t keep);

  C10dPath path_;
  size_t messages_in_flight_ = 0;
  BlockSize block_size_;
  std::shared_ptr<Watch> watch_;
  std::shared_ptr<WaitGuard> guard_;
  std::deque<Sent> in_flight_;
};

/// The receiving end. Keeps some receives of blocks posted ahead of need.
class C10dReceiveChannel final : public ReceiveChannel {
 public:
  C10dReceiveChannel(C10dPath path, std::shared_ptr<Watch> watch, std::shared_ptr<WaitGuard> guard);
  ~C10dReceiveChannel() override;

  int peer() const override { return path_.peer; }
  void begin_step(size_t messages) override;
  Message receive() override;

 private:
  struct Posted {
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor buffer;
  };
  void receive_payload(Message& message, const MessageSpec& spec);
  void post_ahead();
  at::Tensor receive_more(size_t bytes);

  C10dPath path_;
  std::shared_ptr<Watch> watch_;
  std::shared_ptr<WaitGuard> guard_;
  std::deque<Posted> posted_;
  size_t to_post_ = 0;
  BlockSize block_size_;
};

/// Through a process group: every rank tells rank 0, and rank 0 tells every rank.
///
/// A rank that gives up while it waits for rank 0's word has sent its own already. So rank 0 asks for failures before
/// it tells that the step is done; only after a step that was long enough for a rank to give up in.
class C10dConfirmation : public Confirmation {
 public:
  /// `path.peer` is not used.
  C10dConfirmation(C10dPath path, int ranks, int own_rank, std::shared_ptr<WaitGuard> guard);

  void confirm() override;

 private:
  void send(int peer);
  void receive(int peer);

  C10dPath path_;
  int ranks_;
  int own_rank_;
  std::shared_ptr<WaitGuard> guard_;
  Watch::Clock::time_point last_ = Watch::Clock::now();
};

}  // namespace pp_runtime
