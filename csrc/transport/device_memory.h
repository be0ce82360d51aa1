#pragma once

#include "oversight/peer_memory.h"
#include "oversight/segment.h"
#include "transport/block_supply.h"
#include "transport/lane_channel.h"
#include "transport/peer.h"

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace pp_runtime {

class DeviceControl;

/// What both ends of a channel between two devices of a host need beside their host's channel.
struct DevicePath {
  std::shared_ptr<Lanes> lanes;
  std::string name;
  at::Device memory = at::kCPU;
  std::shared_ptr<PeerMemory> peer_memory;
};

/// The sending end of a channel between two devices of one host: the sender copies straight into a slot on the
/// receiver's device; no communicator, no host in between.
///
///     sender's lane     [ wait: producer | wait: freed[slot] >= n - 1 | copy into the slot | arrived[slot] = n ]
///     receiver's lane   [ wait: arrived[slot] >= n | mark ]            compute: [ wait: mark | F ... ]
///     give-back lane    [ wait: compute's mark | freed[slot] = n ]
///
/// The numbers lie in host memory that both map. Each wait is queued after the write that ends it: the description,
/// which makes the receiver queue its wait, leaves after copy and write were queued; a slot comes back through a ring
/// of the host's after its write was queued. So the first of all unfinished operations can always run. Where a rank
/// dies the host stores the numbers that its own streams wait for.
///
/// Owns the slots, which are made on the receiver's device by who first knows their size.
class DeviceSendChannel final : public LaneSendChannel {
 public:
  DeviceSendChannel(std::shared_ptr<SendChannel> host, DevicePath path, std::shared_ptr<Segment> control,
                    std::string receiver_device, uint32_t credits, std::shared_ptr<Watch> watch, SpinTime spin);
  ~DeviceSendChannel() override;
  void abandon() noexcept override;

  /// What the receiving end opens, made before it is known who that is.
  static std::shared_ptr<Segment> make_control();

 protected:
  std::string carry(const Message& message, const MessageSpec& spec, OnItsWay& on_its_way) override;

 private:
  /// Slots of one size, made at once.
  struct Area;
  struct Slot {
    std::shared_ptr<Area> area;
    size_t offset = 0;
    /// How often it was written.
    uint32_t uses = 0;
  };

  uint32_t take_slot(size_t bytes);
  void collect_returns();
  bool grow(size_t bytes);
  void retire(uint32_t slot);

  std::shared_ptr<DeviceControl> control_;
  std::string receiver_device_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  /// Numbers of slots whose memory was of an outgrown size.
  std::vector<uint32_t> unused_;
  BlockSupply supply_;
  uint32_t areas_made_ = 0;
  /// The first area of the present size.
  uint32_t oldest_area_ = 0;
  uint32_t returns_read_ = 0;
  SpinTime spin_;
};

class SlotReturns;

/// The receiving end: its tensors are views of the slots; a slot goes back when the last of them dies, on whatever
/// thread, behind what the compute lane was given until then.
class DeviceReceiveChannel final : public LaneReceiveChannel {
 public:
  DeviceReceiveChannel(std::shared_ptr<ReceiveChannel> host, DevicePath path, Peer sender, int control_fd,
                       std::shared_ptr<Watch> watch);
  ~DeviceReceiveChannel() override;
  void begin_step(size_t messages) override;
  void abandon() noexcept override;

 protected:
  Arrived arrive(const MessageSpec& spec, const std::string& told) override;

 private:
  Peer sender_;
  std::shared_ptr<DeviceControl> control_;
  std::shared_ptr<SlotReturns> returns_;
  std::map<uint32_t, at::Tensor> areas_;
  /// By slot, the number that the lane waits for.
  std::vector<uint32_t> awaited_;
};

}  // namespace pp_runtime
