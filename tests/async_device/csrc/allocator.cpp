#include "allocator.h"

#include "log.h"
#include "settings.h"
#include "streams.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace async_device {

namespace {

constexpr size_t kSmallest = 512;
constexpr int kPoison = 0xff;

struct Block {
  void* memory;
  size_t bytes;
  int64_t stream;
  int64_t number;
  size_t asked;
  std::vector<int64_t> used_on;
};

class CachingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kType, 0);
    if (bytes == 0) {
      return {nullptr, nullptr, &release, device};
    }
    size_t rounded = kSmallest;
    while (rounded < bytes) {
      rounded *= 2;
    }
    const std::lock_guard lock(mutex_);
    reclaim();
    Block* block = take(current().id(), rounded);
    block->asked = bytes;
    in_use_ += bytes;
    most_in_use_ = std::max(most_in_use_, in_use_);
    live_[block->memory] = block;
    return {block->memory, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }

  void record(const void* address, int64_t stream) {
    const std::lock_guard lock(mutex_);
    Block* block = find(address);
    if (block != nullptr && block->stream != stream) {
      block->used_on.push_back(stream);
    }
  }

  int64_t number_at(const void* address) {
    const std::lock_guard lock(mutex_);
    const Block* block = find(address);
    return block == nullptr ? -1 : block->number;
  }

  MemoryInUse in_use(bool forget) {
    const std::lock_guard lock(mutex_);
    const MemoryInUse found{in_use_, most_in_use_};
    if (forget) {
      most_in_use_ = in_use_;
    }
    return found;
  }

 private:
  struct Waiting {
    Block* block;
    std::vector<MomentPointer> users;
  };

  static void release(void* context);

  Block* take(int64_t stream, size_t bytes) {
    auto& list = free_[{stream, bytes}];
    if (!list.empty()) {
      Block* block = list.back();
      list.pop_back();
      return block;
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) {
      throw std::bad_alloc();
    }
    if (settings().poison) {
      std::memset(memory, kPoison, bytes);
    }
    return new Block{memory, bytes, stream, made_++, 0, {}};
  }

  Block* find(const void* address) {
    auto after = live_.upper_bound(address);
    if (after == live_.begin()) {
      return nullptr;
    }
    Block* block = (--after)->second;
    const auto* begin = static_cast<const char*>(block->memory);
    return static_cast<const char*>(address) < begin + block->bytes ? block : nullptr;
  }

  void give_back(Block* block) {
    if (settings().poison) {
      ++counts().poisoned;
      Stream& owner = stream(block->stream);
      log().work_on_block(owner.id(), "poison", block->number);
      owner.queue([block](Time begin) {
        std::memset(block->memory, kPoison, block->bytes);
        return begin;
      });
    }
    free_[{block->stream, block->bytes}].push_back(block);
  }

  /// Blocks whose users on other streams are done go back to their own.
  void reclaim() {
    const auto is_free = [](const Waiting& one) {
      return std::all_of(one.users.begin(), one.users.end(), [](const auto& moment) { return moment->has_come(); });
    };
    const auto first_free = std::stable_partition(waiting_.begin(), waiting_.end(), std::not_fn(is_free));
    for (auto one = first_free; one != waiting_.end(); ++one) {
      for (const auto& moment : one->users) {
        log().passed(*moment);
      }
      give_back(one->block);
    }
    waiting_.erase(first_free, waiting_.end());
  }

  std::mutex mutex_;
  std::map<std::pair<int64_t, size_t>, std::vector<Block*>> free_;
  std::map<const void*, Block*> live_;
  std::deque<Waiting> waiting_;
  int64_t made_ = 0;
  size_t in_use_ = 0;
  size_t most_in_use_ = 0;
};

CachingAllocator& caching() {
  static auto* kept = new CachingAllocator;
  return *kept;
}

void CachingAllocator::release(void* context) {
  auto* block = static_cast<Block*>(context);
  if (block == nullptr) {
    return;
  }
  CachingAllocator& self = caching();
  const std::lock_guard lock(self.mutex_);
  self.live_.erase(block->memory);
  self.in_use_ -= block->asked;
  std::vector<MomentPointer> users;
  for (const int64_t id : std::exchange(block->used_on, {})) {
    users.push_back(stream(id).mark());
  }
  if (users.empty()) {
    self.give_back(block);
  } else {
    self.waiting_.push_back({block, std::move(users)});
  }
}

}  // namespace

c10::Allocator* allocator() { return &caching(); }
void record_on(const void* address, int64_t stream) { caching().record(address, stream); }
int64_t block_at(const void* address) { return caching().number_at(address); }
MemoryInUse memory_in_use(bool forget) { return caching().in_use(forget); }

}  // namespace async_device
