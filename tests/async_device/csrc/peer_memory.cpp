#include "peer_memory.h"

#include "streams.h"

#include <ATen/Functions.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

namespace async_device {

namespace {

constexpr std::chrono::microseconds kLook{20};

struct Awaits {
  std::mutex mutex;
  std::vector<int64_t> streams;
  int64_t left_out = -1;
};

Awaits& awaits() {
  static auto* kept = new Awaits;
  return *kept;
}

/// Takes the descriptor; unmapped and closed with the last tensor.
at::Tensor mapped(int fd, size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) {
    close(fd);
    throw std::runtime_error("the peer's memory cannot be mapped");
  }
  const auto unmap = [fd, bytes](void* address) {
    munmap(address, bytes);
    close(fd);
  };
  const at::Device device(kType, 0);
  return at::for_blob(memory, {static_cast<int64_t>(bytes)})
      .deleter(unmap)
      .options(at::TensorOptions(at::kByte).device(device))
      .target_device(device)
      .make_tensor();
}

}  // namespace

std::string PeerMemory::name() const { return "sim of process " + std::to_string(getpid()); }

PeerMemory::Mapping PeerMemory::allocate(const std::string&, size_t bytes) {
  const int fd = memfd_create("async_device", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    throw std::runtime_error("there is no memory to share");
  }
  return {.bytes = mapped(fd, bytes), .fd = fd};
}

at::Tensor PeerMemory::open(const Handle& handle) {
  const std::string path = "/proc/" + std::to_string(handle.pid) + "/fd/" + std::to_string(handle.fd);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat found = {};
  if (fd < 0 || fstat(fd, &found) != 0 || static_cast<uint64_t>(found.st_size) < handle.bytes) {
    throw std::runtime_error("the peer's memory cannot be opened");
  }
  return mapped(fd, handle.bytes);
}

void PeerMemory::write(const c10::Stream& on, std::atomic<uint32_t>& number, uint32_t value) {
  stream(on.id()).queue([&number, value](Time begin) {
    number.store(value, std::memory_order_release);
    return begin;
  });
}

void PeerMemory::wait(const c10::Stream& on, const std::atomic<uint32_t>& number, uint32_t value) {
  {
    const std::lock_guard lock(awaits().mutex);
    awaits().streams.push_back(on.id());
    if (static_cast<int64_t>(awaits().streams.size()) == awaits().left_out + 1) {
      return;
    }
  }
  stream(on.id()).queue([&number, value](Time begin) {
    const auto is_there = [&] { return static_cast<int32_t>(number.load(std::memory_order_acquire) - value) >= 0; };
    if (is_there()) {
      return begin;
    }
    while (!is_there()) {
      std::this_thread::sleep_for(kLook);
    }
    return std::max(begin, Clock::now());
  });
}

std::vector<int64_t> leave_out_await(int64_t number) {
  const std::lock_guard lock(awaits().mutex);
  awaits().left_out = number;
  return std::exchange(awaits().streams, {});
}

}  // namespace async_device
