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
  left_out_ = LeftOut();
}

bool Log::leaves_out(int64_t stream, const Moment& moment) {
  const std::lock_guard lock(mutex_);
  if (left_out_.asked++ != number_) {
    return false;
  }
  left_out_.waiting = stream;
  left_out_.awaited = moment.stream();
  left_out_.place = records_.size();
  return true;
}

Log::LeftOut Log::left_out() const {
  const std::lock_guard lock(mutex_);
  return left_out_;
}

}  // namespace async_device
