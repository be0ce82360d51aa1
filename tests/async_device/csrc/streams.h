#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>

namespace async_device {

constexpr auto kType = c10::DeviceType::PrivateUse1;
using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;

/// A point in a stream, which comes once: all that was queued before it is done. Any thread may ask and wait.
class Moment {
 public:
  Moment(int64_t stream, uint64_t number) : stream_(stream), number_(number) {}

  void come(Time when);
  void wait() const;
  bool has_come() const;
  /// Once it has come: on the device's clock, which all processes of a host share.
  Time when() const;

  int64_t stream() const { return stream_; }
  uint64_t number() const { return number_; }

 private:
  const int64_t stream_;
  const uint64_t number_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool has_come_ = false;
  Time when_;
};

using MomentPointer = std::shared_ptr<const Moment>;

/// A queue of work with a thread that does it, one thing after another.
///
/// It keeps a clock of its own: a task begins when the one before it has ended and the host has queued it, and where
/// tasks have durations it ends that much later, however late the thread woke up. So the times of a step on two cores
/// are those of a device that has its own clock. Streams are never destroyed. Any thread may queue; none is held.
class Stream {
 public:
  /// Gets the time at which it may begin, returns the time at which it has ended. On the stream's thread.
  using Task = std::function<Time(Time begin)>;

  explicit Stream(int64_t id);

  void queue(Task task);
  /// Work that computes, or takes so long where streams sleep instead. A delay may come before it.
  void launch(std::function<void()> kernel, std::chrono::nanoseconds takes);
  /// The delay that may come before work. On the stream's thread.
  void delay();
  MomentPointer mark();
  /// What is queued from now on begins after the moment.
  void wait_for(MomentPointer moment);
  bool is_idle();
  int64_t id() const { return id_; }

 private:
  struct Item {
    Task task;
    Time queued;
  };
  void run();

  const int64_t id_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> items_;
  bool busy_ = false;
  /// The thread's own.
  std::mt19937_64 random_;
  uint64_t draw_ = UINT64_MAX;
};

Stream& stream(int64_t id);
/// The calling thread's current stream; `make_current` returns the one before it.
Stream& current();
int64_t make_current(int64_t id);
Stream& make_stream();
c10::Stream as_c10(const Stream& stream);

/// The host waits, and learns what failed. GIL not held.
void synchronize(const Moment& moment);
void synchronize_device();
/// Whether the moment has come; the host knows it from then on.
bool host_sees(const Moment& moment);

/// An error on a stream is found by the host at its next wait, and at every later one: the device is lost.
void fail(const std::string& what);
void throw_if_failed();
/// For the next test of the process; no real device can.
void forget_failure();

}  // namespace async_device
