#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace pp_runtime {

/// One thing that was asked of a recorded device, in the order in which the host asked.
struct LaneRecord {
  enum class Kind : uint8_t {
    /// Work was queued on a lane; `reads` and `writes` name the memory it touches.
    kWork,
    /// An event was recorded on a lane.
    kMark,
    /// A lane was made to wait for an event.
    kWait,
    /// The host learned that an event has passed.
    kPassed,
    /// A number that other ranks' lanes wait for (`text`) was set to `event` on a lane, once what is queued there is
    /// done.
    kSignal,
    /// A lane was made to wait until the number is `event`.
    kAwait
  };
  Kind kind;
  int64_t lane;
  uint64_t event;
  std::string text;
  std::vector<std::string> reads;
  std::vector<std::string> writes;
  /// When the host asked, on the clock that all ranks of a host share.
  int64_t time_ns;
};

/// What a step asked of its lanes, for the proof that it was in order (pp_runtime/planning/lane_order.py). Any thread.
class LaneLog {
 public:
  /// `omitted_wait` is the number of a wait that is left out, as if the runtime had forgotten it; -1 for none.
  explicit LaneLog(int64_t omitted_wait = -1) : omitted_wait_(omitted_wait) {}

  void name(int64_t lane, std::string text);
  void work(int64_t lane, std::string text, std::vector<std::string> reads, std::vector<std::string> writes);
  void mark(int64_t lane, uint64_t event);
  void wait(int64_t lane, uint64_t event);
  void passed(uint64_t event);
  void signal(int64_t lane, std::string number, uint64_t value);
  void await(int64_t lane, std::string number, uint64_t value);

  std::vector<LaneRecord> records() const;
  std::vector<std::pair<int64_t, std::string>> names() const;

  /// How many things were written down.
  size_t size() const;

 private:
  mutable std::mutex mutex_;
  std::vector<LaneRecord> records_;
  std::vector<std::pair<int64_t, std::string>> names_;
  int64_t omitted_wait_;
  int64_t waits_ = 0;
};

/// Puts under torch's PrivateUse1 a device that has streams and events but does nothing except write into `log`, and
/// returns it. The runtime reaches it as it reaches CUDA, through c10's guards. For tests: throws where the process has
/// a real PrivateUse1 device.
at::Device record_device(std::shared_ptr<LaneLog> log);

}  // namespace pp_runtime
