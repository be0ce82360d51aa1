#include "streams.h"

#include "log.h"
#include "settings.h"

#include <c10/util/Exception.h>
#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace async_device {

namespace {

struct Streams {
  std::mutex mutex;
  std::vector<Stream*> all;
};

Streams& streams() {
  static auto* kept = new Streams;
  return *kept;
}

struct Failure {
  std::mutex mutex;
  std::string what;
};

Failure& failure() {
  static auto* kept = new Failure;
  return *kept;
}

bool has_failed() {
  const std::lock_guard lock(failure().mutex);
  return !failure().what.empty();
}

thread_local int64_t current_id = 0;

}  // namespace

void Moment::come(Time when) {
  {
    const std::lock_guard lock(mutex_);
    has_come_ = true;
    when_ = when;
  }
  changed_.notify_all();
}

void Moment::wait() const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return has_come_; });
}

bool Moment::has_come() const {
  const std::lock_guard lock(mutex_);
  return has_come_;
}

Time Moment::when() const {
  const std::lock_guard lock(mutex_);
  return when_;
}

Stream::Stream(int64_t id) : id_(id) {
  std::thread([this] { run(); }).detach();
}

void Stream::run() {
  current_id = id_;
  prctl(PR_SET_TIMERSLACK, 1000);  // nanoseconds: sleeps end when they should
  Time clock;
  std::unique_lock lock(mutex_);
  for (;;) {
    busy_ = false;
    changed_.wait(lock, [this] { return !items_.empty(); });
    busy_ = true;
    Item item = std::move(items_.front());
    items_.pop_front();
    lock.unlock();
    clock = std::max(clock, item.queued);
    try {
      clock = item.task(clock);
    } catch (const c10::Error& error) {
      fail(error.what_without_backtrace());
    } catch (const std::exception& error) {
      fail(error.what());
    }
    item.task = nullptr;
    lock.lock();
  }
}

void Stream::delay() {
  const Settings& set = settings();
  if (std::exchange(draw_, set.delay_draw.load()) != set.delay_draw) {
    random_.seed(set.delay_seed * 1000003 + static_cast<uint64_t>(id_));
  }
  const auto most = static_cast<uint64_t>(set.delay_us);
  if (most > 0 && random_() % static_cast<uint64_t>(set.delay_one_in) == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(random_() % most));
  }
  if (set.slow_stream == id_) {
    std::this_thread::sleep_for(std::chrono::microseconds(set.slow_us));
  }
}

void Stream::queue(Task task) {
  ++counts().tasks;
  {
    const std::lock_guard lock(mutex_);
    items_.push_back({std::move(task), Clock::now()});
  }
  changed_.notify_one();
}

void Stream::launch(std::function<void()> kernel, std::chrono::nanoseconds takes) {
  queue([this, kernel = std::move(kernel), takes](Time begin) {
    if (settings().sleeps) {
      std::this_thread::sleep_until(begin + takes);
      return begin + takes;
    }
    delay();
    if (!has_failed()) {
      kernel();
    }
    return Clock::now();
  });
}

MomentPointer Stream::mark() {
  static std::atomic<uint64_t> numbers{0};
  ++counts().marks;
  auto moment = std::make_shared<Moment>(id_, ++numbers);
  log().mark(*moment);
  queue([moment](Time begin) {
    moment->come(begin);
    return begin;
  });
  return moment;
}

void Stream::wait_for(MomentPointer moment) {
  ++counts().waits;
  log().wait(id_, *moment);
  queue([moment = std::move(moment)](Time begin) {
    moment->wait();
    return std::max(begin, moment->when());
  });
}

bool Stream::is_idle() {
  const std::lock_guard lock(mutex_);
  return items_.empty() && !busy_;
}

Stream& stream(int64_t id) {
  const std::lock_guard lock(streams().mutex);
  auto& all = streams().all;
  if (all.empty()) {
    all.push_back(new Stream(0));
  }
  return *all.at(static_cast<size_t>(id));
}

Stream& current() { return stream(current_id); }

int64_t make_current(int64_t id) { return std::exchange(current_id, id); }

Stream& make_stream() {
  stream(0);
  const std::lock_guard lock(streams().mutex);
  auto& all = streams().all;
  all.push_back(new Stream(static_cast<int64_t>(all.size())));
  return *all.back();
}

c10::Stream as_c10(const Stream& stream) { return c10::Stream(c10::Stream::UNSAFE, {kType, 0}, stream.id()); }

void synchronize(const Moment& moment) {
  ++counts().host_waits;
  moment.wait();
  log().passed(moment);
  throw_if_failed();
}

void synchronize_device() {
  std::vector<Stream*> all;
  {
    const std::lock_guard lock(streams().mutex);
    all = streams().all;
  }
  for (Stream* one : all) {
    synchronize(*one->mark());
  }
}

bool host_sees(const Moment& moment) {
  throw_if_failed();
  const bool seen = moment.has_come();
  if (seen) {
    log().passed(moment);
  }
  return seen;
}

void fail(const std::string& what) {
  const std::lock_guard lock(failure().mutex);
  if (failure().what.empty()) {
    failure().what = what;
  }
}

void throw_if_failed() {
  const std::lock_guard lock(failure().mutex);
  if (!failure().what.empty()) {
    throw std::runtime_error("the asynchronous device failed: " + failure().what);
  }
}

void forget_failure() {
  const std::lock_guard lock(failure().mutex);
  failure().what.clear();
}

}  // namespace async_device
