#pragma once

#include "lanes/lane_log.h"

#include <c10/core/Device.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace pp_runtime {

/// A point in a lane: everything that was queued on it before. Recorded once; any thread may ask and wait.
class Mark {
 public:
  explicit Mark(const c10::Stream& lane) : event_(lane.device_type()) { event_.record(lane); }

  /// What is queued on `lane` from now on waits, on the device's own clock; the host does not.
  void hold_back(const c10::Stream& lane) const { event_.block(lane); }
  /// Whether the device is past it. The host does not wait.
  bool passed() const { return event_.query(); }

 private:
  c10::Event event_;
};

using MarkPointer = std::shared_ptr<const Mark>;

/// What a message is to the lanes. A message of the host has none.
struct LaneTicket {
  /// After this its tensors may be read: its producer's mark on the sending rank, its arrival's on the receiving one.
  MarkPointer ready;
  /// What the log calls the tensors' memory; empty where nothing is logged.
  std::string buffer;
  /// Expires when the last tensor that lies in the message's slot dies.
  std::weak_ptr<void> slot;
};

/// The lanes of a rank on its device: what is queued where, and what waits for what.
///
///     receive lane   [ wait: slot's last reader | receive | mark ]
///     compute lane                               [ wait: arrival | F | mark ]
///     send lane                                                  [ wait: producer | copy, send | mark ]
///
/// The compute lane is the stream that is current when a step begins, so that the user's own work before and after a
/// step is in order with it. Each channel has a lane of its own. All goes through c10's guards, so any accelerator that
/// torch knows has lanes; a CPU has none: there the pointer to this class is null, and that is all it costs.
///
/// Shared by the executor, the channels and every slot that is still in use.
class Lanes {
 public:
  explicit Lanes(at::Device device);
  /// Lanes of a device that does nothing but write down what is asked of it; the tensors stay on the CPU.
  explicit Lanes(std::shared_ptr<LaneLog> log);
  ~Lanes();
  Lanes(const Lanes&) = delete;
  Lanes& operator=(const Lanes&) = delete;

  /// A lane that nothing else is queued on, of the highest priority that the device has.
  c10::Stream make(const std::string& name);

  /// Makes the calling thread's current stream the compute lane.
  void begin_step();
  c10::Stream compute() const;
  MarkPointer mark(const c10::Stream& lane) const { return std::make_shared<const Mark>(lane); }

  at::Device device() const { return device_; }
  /// Null on a real device. Where there is one, the process group works on the host, so its works are waited for there.
  LaneLog* log() const { return log_.get(); }

 private:
  at::Device device_;
  std::shared_ptr<LaneLog> log_;
  std::vector<c10::Stream> made_;
  mutable std::mutex mutex_;
  c10::Stream compute_;
};

/// How long a step takes on the compute lane: two events a step, which the host waits for only when it is asked.
class LaneStopwatch {
 public:
  explicit LaneStopwatch(std::shared_ptr<const Lanes> lanes);
  void start();
  void stop();
  /// Of the last start and stop, once the device is past it; waits for that. GIL not needed.
  double seconds() const;

 private:
  std::shared_ptr<const Lanes> lanes_;
  c10::Event started_;
  c10::Event stopped_;
};

/// The compute lane's clock, for the timeline: moments on the device as host nanoseconds. GIL not needed.
class LaneClock {
 public:
  explicit LaneClock(std::shared_ptr<const Lanes> lanes);
  /// Waits for the device once, to have one moment on both clocks.
  void begin();
  /// The number of a new moment on the compute lane.
  size_t moment();
  /// When it was, once the device is past it; waits for that.
  int64_t host_ns(size_t moment) const;

 private:
  std::shared_ptr<const Lanes> lanes_;
  std::vector<c10::Event> moments_;
  int64_t begun_ns_ = 0;
};

}  // namespace pp_runtime
