#pragma once

#include "streams.h"
#include "wire.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace async_device {

/// One that a stream is to send or to receive.
struct Message {
  std::shared_ptr<Wire> wire;
  int peer;
  bool sends;
  at::Tensor tensor;
};

/// A process group that works as NCCL's does: what it is asked for is queued on a stream of its own, behind what is on
/// the current one; waiting for it makes the current stream wait, and the host does not.
///
/// All messages between two ranks share a stream, one after another; a coalesced group of them is one piece of work on
/// the stream of the collectives. A message from a rank that died, or that never sends, keeps its stream until `abort`.
/// Used under the GIL.
class Group final : public c10d::Backend {
 public:
  /// `collectives` carries reductions between the hosts; null where there will be none.
  Group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, std::string name,
        c10::intrusive_ptr<c10d::Backend> collectives);

  const std::string getBackendName() const override { return name_; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override { collects_ = true; }
  c10::intrusive_ptr<c10d::Work> endCoalescing() override;
  void abort() override { halt_->stop(); }

  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int to, int tag) override;
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int from, int tag) override;
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override;
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override;

 private:
  struct Pair {
    std::shared_ptr<Wire> to_peer;
    std::shared_ptr<Wire> from_peer;
  };
  using OnHost = std::function<c10::intrusive_ptr<c10d::Work>(c10d::Backend&)>;

  void connect(const c10::intrusive_ptr<c10d::Store>& store);
  c10::intrusive_ptr<c10d::Work> post(int peer, const at::Tensor& tensor, bool sends);
  c10::intrusive_ptr<c10d::Work> queue_messages(int which, std::vector<Message> messages);
  /// A collective of the hosts, over the tensors' memory.
  c10::intrusive_ptr<c10d::Work> queue_collective(const char* name, std::vector<at::Tensor> reads,
                                                  std::vector<at::Tensor> writes, OnHost on_host);
  Stream& stream_of(int which);

  std::string name_;
  c10::intrusive_ptr<c10d::Backend> collectives_;
  std::shared_ptr<Halt> halt_ = std::make_shared<Halt>();
  std::map<int, Pair> pairs_;
  std::map<int, Stream*> streams_;
  bool collects_ = false;
  std::vector<Message> collected_;
};

}  // namespace async_device
