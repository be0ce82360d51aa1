#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace async_device {

class Moment;

/// One thing that was asked of the device, in the order in which the host asked: what pp_runtime's recorded lanes write
/// down too, so that one proof reads both (pp_runtime/planning/lane_order.py). Memory is named by its block.
struct Record {
  const char* kind;
  int64_t stream;
  uint64_t moment;
  std::string text;
  std::vector<std::string> reads;
  std::vector<std::string> writes;
};

/// What was asked of the device, if a test wants to know, and the one wait that it wants left out. Any thread.
class Log {
 public:
  void begin();
  std::vector<Record> end();
  bool is_on() const { return on_; }

  /// `reads` and `writes` are addresses; those that are not the device's are passed over.
  void work(int64_t stream, std::string text, const std::vector<const void*>& reads,
            const std::vector<const void*>& writes);
  /// The same for a block that is in use no more.
  void work_on_block(int64_t stream, const char* text, int64_t written);
  void mark(const Moment& moment);
  void wait(int64_t stream, const Moment& moment);
  void passed(const Moment& moment);

  /// From now on waits are numbered, and the one of this number is left out; -1 for none.
  void leave_out(int64_t number);
  /// The same for the wait of this number among those of one stream for another.
  void leave_out_between(int64_t waiting, int64_t awaited, int64_t number);
  /// Whether this wait is the one. Asked for waits that a user of the device asks for, not for those inside of it.
  bool leaves_out(int64_t stream, const Moment& moment);
  struct LeftOut {
    /// Which streams it was between, and its number among the waits of one for the other; -1 where none was left out.
    int64_t waiting = -1;
    int64_t awaited = -1;
    int64_t number_between = -1;
  };
  LeftOut left_out() const;

 private:
  void add(Record record);

  std::atomic<bool> on_{false};
  mutable std::mutex mutex_;
  std::vector<Record> records_;
  int64_t number_ = -1;
  LeftOut wanted_;
  int64_t asked_ = 0;
  std::map<std::pair<int64_t, int64_t>, int64_t> asked_between_;
  LeftOut left_out_;
};

Log& log();

}  // namespace async_device
