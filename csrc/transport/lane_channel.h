#pragma once

#include "lanes/lanes.h"
#include "oversight/watch.h"
#include "transport/transport.h"

#include <deque>
#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

/// The sending end of a channel whose tensors lie on an accelerator.
///
/// What describes a message goes from host to host, through a channel of its own (shared memory on one host, c10d
/// elsewhere), after the tensors' way was queued on the channel's lane, which waits for their producer and for nothing
/// else. The tensors are held until the host sees that the device has done with them, or the step ends; the host waits
/// for that only where it is `most` messages ahead.
class LaneSendChannel : public SendChannel {
 public:
  int peer() const override { return host_->peer(); }
  void send(Message message) override;
  /// The host does not wait for the device. What the user does next with the step's tensors waits for their copies.
  void finish_step() override;

 protected:
  struct OnItsWay {
    std::vector<at::Tensor> tensors;
    std::string buffer;
    /// After this the tensors are read no more; after `done` nothing of the message is needed here.
    MarkPointer copied;
    MarkPointer done;
    /// Whatever must outlive `done`.
    std::shared_ptr<void> kept;
  };

  LaneSendChannel(std::shared_ptr<SendChannel> host, std::shared_ptr<Lanes> lanes, std::string name, size_t most,
                  std::shared_ptr<Watch> watch);

  /// Queues the tensors' way on the lane; returns what the receiving end of the same kind needs to know beside the
  /// description.
  virtual std::string carry(const Message& message, const MessageSpec& spec, OnItsWay& on_its_way) = 0;
  /// A recorded device's works are waited for on the host when their end is needed.
  virtual void ended(OnItsWay&) {}
  /// Copies the tensors, packed, into `memory`, behind their producer.
  void copy_into(const at::Tensor& memory, const Message& message, const MessageSpec& spec) const;
  /// Takes what is still on its way, for a destructor.
  std::deque<OnItsWay> take_on_their_way() { return std::move(on_their_way_); }

  const std::string& name() const { return name_; }
  const c10::Stream& lane() const { return lane_; }
  Lanes& lanes() const { return *lanes_; }
  Watch& watch() const { return *watch_; }

 private:
  void drop_tensors(OnItsWay& message);
  void drop_done(size_t most);
  void drop_oldest();

  std::shared_ptr<SendChannel> host_;
  std::shared_ptr<Lanes> lanes_;
  std::string name_;
  c10::Stream lane_;
  size_t most_;
  std::shared_ptr<Watch> watch_;
  std::deque<OnItsWay> on_their_way_;
};

/// The receiving end: when the description has come the tensors' arrival is queued on the channel's own lane. The host
/// does not wait for it.
class LaneReceiveChannel : public ReceiveChannel {
 public:
  int peer() const override { return host_->peer(); }
  void begin_step(size_t messages) override { host_->begin_step(messages); }
  Message receive() override;

 protected:
  /// `memory` is where tensors lie: the lanes' device, of a recorded one the host.
  LaneReceiveChannel(std::shared_ptr<ReceiveChannel> host, std::shared_ptr<Lanes> lanes, std::string name,
                     at::Device memory, std::shared_ptr<Watch> watch);

  struct Arrived {
    std::vector<at::Tensor> tensors;
    std::string buffer;
    std::weak_ptr<void> slot;
  };

  /// Queues the arrival on the lane; `told` is what `carry` returned. The tensors may be read after the lane's next
  /// mark.
  virtual Arrived arrive(const MessageSpec& spec, const std::string& told) = 0;

  const std::string& name() const { return name_; }
  const c10::Stream& lane() const { return lane_; }
  Lanes& lanes() const { return *lanes_; }
  const std::shared_ptr<Lanes>& shared_lanes() const { return lanes_; }
  Watch& watch() const { return *watch_; }
  const MarkPointer& last_arrival() const { return last_arrival_; }

 private:
  std::shared_ptr<ReceiveChannel> host_;
  std::shared_ptr<Lanes> lanes_;
  std::string name_;
  at::Device memory_;
  c10::Stream lane_;
  std::shared_ptr<Watch> watch_;
  MarkPointer last_arrival_;
};

/// Waits, before a channel closes, until the device comes to `mark`. False where it never will, as a rank failed.
bool comes_to(const Lanes& lanes, const MarkPointer& mark, Watch& watch) noexcept;

/// The same for a device whose streams wait for nobody any more. False where it hangs or failed.
bool drains(const Lanes& lanes, const MarkPointer& mark) noexcept;

}  // namespace pp_runtime
