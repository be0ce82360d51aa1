#include "process_group.h"

#include "log.h"
#include "settings.h"
#include "tensors.h"

#include <ATen/core/ivalue.h>
#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <thread>
#include <utility>

namespace async_device {

namespace {

/// The stream of collectives and of coalesced messages; those of single messages are 1 + the peer.
constexpr int kCollectives = 0;

/// Goes ahead of a message, and back from a receiver: when the stream came to it, on the clock that both share.
struct Ready {
  int64_t since_epoch;
};

Ready as_ready(Time time) { return {time.time_since_epoch().count()}; }
Time as_time(Ready ready) { return Time(Clock::duration(ready.since_epoch)); }

/// The messages begin when both ends have come to them, and end all at once.
Time carry(const std::vector<Message>& messages, const Halt& halt, Time begin) {
  const Settings& set = settings();
  Ready ours = as_ready(begin);
  std::vector<Ready> theirs(messages.size(), ours);
  std::vector<Transfer> transfers;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [wire, peer, sends, tensor] = messages[i];
    // A sender's word goes ahead of its message, a receiver's goes back; each waits for the other's.
    if (sends || set.rendezvous) {
      transfers.push_back({wire, true, reinterpret_cast<char*>(&ours), sizeof ours});
    }
    if (!sends || set.rendezvous) {
      transfers.push_back({wire, false, reinterpret_cast<char*>(&theirs[i]), sizeof ours});
    }
    if (!set.sleeps) {
      transfers.push_back({wire, sends, static_cast<char*>(const_cast<void*>(address_of(tensor))), tensor.nbytes()});
    }
  }
  transfer_all(std::move(transfers), halt);
  if (!set.sleeps) {
    return Clock::now();
  }
  for (const Ready ready : theirs) {
    begin = std::max(begin, as_time(ready));
  }
  std::this_thread::sleep_until(begin + set.transfer_takes);
  return begin + set.transfer_takes;
}

std::vector<const void*> addresses_of(const std::vector<at::Tensor>& tensors) {
  std::vector<const void*> addresses;
  for (const at::Tensor& tensor : tensors) {
    addresses.push_back(address_of(tensor));
  }
  return addresses;
}

/// Work on a stream of the group. Keeps the tensors until somebody waits for it, as NCCL's does.
class StreamWork final : public c10d::Work {
 public:
  StreamWork(MomentPointer end, std::vector<at::Tensor> tensors, bool host_waits)
      : end_(std::move(end)), tensors_(std::move(tensors)), host_waits_(host_waits) {}

  bool isCompleted() override { return host_sees(*end_); }
  bool isSuccess() const override { return true; }
  void synchronize() override {
    if (!log().leaves_out(current().id(), *end_)) {
      current().wait_for(end_);
    }
    tensors_.clear();
  }
  bool wait(std::chrono::milliseconds) override {
    if (host_waits_) {
      async_device::synchronize(*end_);
    } else {
      synchronize();
    }
    return true;
  }
  void abort() override {}
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

  /// What DDP's hooks ask for: ready at once, with the stream to wait for.
  void make_future(const Stream& on) {
    const c10::StreamGuard guard(as_c10(on));
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()),
                                                       std::vector<c10::Device>{{kType, 0}});
    future_->markCompleted(c10::IValue(tensors_));
  }

 private:
  MomentPointer end_;
  std::vector<at::Tensor> tensors_;
  bool host_waits_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

/// For a message of a coalesced group, which has no end of its own.
class PartOfGroup final : public c10d::Work {
 public:
  bool isCompleted() override { return false; }
  bool wait(std::chrono::milliseconds) override { return true; }
};

}  // namespace

Group::Group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::string name,
             c10::intrusive_ptr<c10d::Backend> collectives)
    : Backend(rank, size), name_(std::move(name)), collectives_(std::move(collectives)) {
  connect(store);
}

void Group::connect(const c10::intrusive_ptr<c10d::Store>& store) {
  const auto key = [](int from, int to) { return "wire/" + std::to_string(from) + "/" + std::to_string(to); };
  // The higher rank listens. It tells all its addresses before it asks for any, so that nobody waits in a circle.
  for (int peer = 0; peer < rank_; ++peer) {
    Pair& pair = pairs_[peer];
    pair.to_peer = std::make_shared<Wire>();
    pair.from_peer = std::make_shared<Wire>();
    store->set(key(rank_, peer), pair.to_peer->address());
    store->set(key(peer, rank_), pair.from_peer->address());
  }
  for (int peer = rank_ + 1; peer < size_; ++peer) {
    Pair& pair = pairs_[peer];
    pair.to_peer = std::make_shared<Wire>(store->get_to_str(key(rank_, peer)));
    pair.from_peer = std::make_shared<Wire>(store->get_to_str(key(peer, rank_)));
  }
}

Stream& Group::stream_of(int which) {
  Stream*& found = streams_[which];
  if (found == nullptr) {
    found = &make_stream();
  }
  return *found;
}

c10::intrusive_ptr<c10d::Work> Group::send(std::vector<at::Tensor>& tensors, int to, int) {
  return post(to, tensors.at(0), true);
}

c10::intrusive_ptr<c10d::Work> Group::recv(std::vector<at::Tensor>& tensors, int from, int) {
  return post(from, tensors.at(0), false);
}

c10::intrusive_ptr<c10d::Work> Group::post(int peer, const at::Tensor& tensor, bool sends) {
  TORCH_CHECK(is_ours(tensor) && tensor.is_contiguous(), name_, " carries contiguous tensors of the device");
  const Pair& pair = pairs_.at(peer);
  Message message{sends ? pair.to_peer : pair.from_peer, peer, sends, tensor};
  if (collects_) {
    collected_.push_back(std::move(message));
    return c10::make_intrusive<PartOfGroup>();
  }
  return queue_messages(1 + peer, {std::move(message)});
}

c10::intrusive_ptr<c10d::Work> Group::endCoalescing() {
  collects_ = false;
  return queue_messages(kCollectives, std::exchange(collected_, {}));
}

c10::intrusive_ptr<c10d::Work> Group::queue_messages(int which, std::vector<Message> messages) {
  Stream& own = stream_of(which);
  own.wait_for(current().mark());
  std::vector<at::Tensor> kept;
  for (Message& message : messages) {
    const std::vector<const void*> memory = {address_of(message.tensor)};
    const std::vector<const void*> none;
    const std::string text = (message.sends ? "send " : "receive ") + message.wire->next_message() + " from stream " +
                             std::to_string(current().id());
    log().work(own.id(), text, message.sends ? memory : none, message.sends ? none : memory);
    kept.push_back(message.tensor);
    // The stream gets the memory; it keeps nothing alive.
    message.tensor = on_cpu(message.tensor);
  }
  own.queue([&own, messages = std::move(messages), halt = halt_](Time begin) {
    if (!settings().sleeps) {
      own.delay();
    }
    return carry(messages, *halt, begin);
  });
  return c10::make_intrusive<StreamWork>(own.mark(), std::move(kept), false);
}

c10::intrusive_ptr<c10d::Work> Group::queue_collective(const char* name, std::vector<at::Tensor> reads,
                                                       std::vector<at::Tensor> writes, OnHost on_host) {
  TORCH_CHECK(collectives_, name_, " of two ranks only has no collectives");
  Stream& own = stream_of(kCollectives);
  own.wait_for(current().mark());
  log().work(own.id(), name, addresses_of(reads), addresses_of(writes));
  own.launch([on_host = std::move(on_host), backend = collectives_] { on_host(*backend)->wait(); },
             settings().transfer_takes);
  reads.insert(reads.end(), writes.begin(), writes.end());
  const bool is_barrier = reads.empty();
  auto work = c10::make_intrusive<StreamWork>(own.mark(), std::move(writes), is_barrier);
  work->make_future(own);
  return work;
}

c10::intrusive_ptr<c10d::Work> Group::allreduce(std::vector<at::Tensor>& tensors,
                                                const c10d::AllreduceOptions& options) {
  return queue_collective("allreduce", tensors, tensors,
                          [options, one = std::vector<at::Tensor>{on_cpu(tensors.at(0))}](c10d::Backend& backend) {
                            auto given = one;
                            return backend.allreduce(given, options);
                          });
}

c10::intrusive_ptr<c10d::Work> Group::broadcast(std::vector<at::Tensor>& tensors,
                                                const c10d::BroadcastOptions& options) {
  return queue_collective("broadcast", tensors, tensors,
                          [options, one = std::vector<at::Tensor>{on_cpu(tensors.at(0))}](c10d::Backend& backend) {
                            auto given = one;
                            return backend.broadcast(given, options);
                          });
}

c10::intrusive_ptr<c10d::Work> Group::allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                                std::vector<at::Tensor>& inputs,
                                                const c10d::AllgatherOptions& options) {
  std::vector<at::Tensor> into;
  for (const at::Tensor& output : outputs.at(0)) {
    into.push_back(on_cpu(output));
  }
  return queue_collective("allgather", {inputs.at(0)}, outputs.at(0),
                          [options, into, from = on_cpu(inputs.at(0))](c10d::Backend& backend) {
                            std::vector<std::vector<at::Tensor>> to = {into};
                            std::vector<at::Tensor> given = {from};
                            return backend.allgather(to, given, options);
                          });
}

c10::intrusive_ptr<c10d::Work> Group::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::AllgatherOptions& options) {
  return queue_collective("allgather", {input}, {output},
                          [options, to = on_cpu(output), from = on_cpu(input)](c10d::Backend& backend) {
                            at::Tensor into = to;
                            at::Tensor given = from;
                            return backend._allgather_base(into, given, options);
                          });
}

c10::intrusive_ptr<c10d::Work> Group::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                           const c10d::ReduceScatterOptions& options) {
  return queue_collective("reduce_scatter", {input}, {output},
                          [options, to = on_cpu(output), from = on_cpu(input)](c10d::Backend& backend) {
                            at::Tensor into = to;
                            at::Tensor given = from;
                            return backend._reduce_scatter_base(into, given, options);
                          });
}

c10::intrusive_ptr<c10d::Work> Group::barrier(const c10d::BarrierOptions& options) {
  return queue_collective("barrier", {}, {}, [options](c10d::Backend& backend) { return backend.barrier(options); });
}

}  // namespace async_device
