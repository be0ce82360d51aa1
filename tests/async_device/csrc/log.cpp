#include "log.h"

#include "allocator.h"
#include "streams.h"

#include <utility>

namespace async_device {

namespace {

std::string name_of(int64_t block) { return "block " + std::to_string(block); }

std::vector<std::string> names_of(const std::vector<const void*>& addresses) {
  std::vector<std::string> names;
  for (const void* address : addresses) {
    if (const int64_t block = block_at(address); block >= 0) {
      names.push_back(name_of(block));
    }
  }
  return names;
}

}  // namespace

Log& log() {
  static auto* kept = new Log;
  return *kept;
}

void Log::begin() {
  const std::lock_guard lock(mutex_);
  records_.clear();
  on_ = true;
}

std::vector<Record> Log::end() {
  const std::lock_guard lock(mutex_);
  on_ = false;
  return std::exchange(records_, {});
}

void Log::add(Record record) {
  const std::lock_guard lock(mutex_);
  records_.push_back(std::move(record));
}

void Log::work(int64_t stream, std::string text, const std::vector<const void*>& reads,
               const std::vector<const void*>& writes) {
  if (on_) {
    add({"work", stream, 0, std::move(text), names_of(reads), names_of(writes)});
  }
}

void Log::work_on_block(int64_t stream, const char* text, int64_t written) {
  if (on_) {
    add({"work", stream, 0, text, {}, {name_of(written)}});
  }
}

void Log::mark(const Moment& moment) {
  if (on_) {
    add({"mark", moment.stream(), moment.number(), {}, {}, {}});
  }
}

void Log::wait(int64_t stream, const Moment& moment) {
  if (on_) {
    add({"wait", stream, moment.number(), {}, {}, {}});
  }
}

void Log::passed(const Moment& moment) {
  if (on_) {
    add({"passed", moment.stream(), moment.number(), {}, {}, {}});
  }
}

void Log::leave_out(int64_t number) {
  const std::lock_guard lock(mutex_);
  number_ = number;
  wanted_ = left_out_ = LeftOut();
  asked_ = 0;
  asked_between_.clear();
}

void Log::leave_out_between(int64_t waiting, int64_t awaited, int64_t number) {
  leave_out(-1);
  const std::lock_guard lock(mutex_);
  wanted_ = {waiting, awaited, number};
}

bool Log::leaves_out(int64_t stream, const Moment& moment) {
  const std::lock_guard lock(mutex_);
  const int64_t number_between = asked_between_[{stream, moment.stream()}]++;
  const bool is_wanted =
      stream == wanted_.waiting && moment.stream() == wanted_.awaited && number_between == wanted_.number_between;
  if (asked_++ != number_ && !is_wanted) {
    return false;
  }
  left_out_ = {stream, moment.stream(), number_between};
  return true;
}

Log::LeftOut Log::left_out() const {
  const std::lock_guard lock(mutex_);
  return left_out_;
}

}  // namespace async_device
