// What device channels rest on, asked of the hardware: memory of one process that another maps, numbers in host memory
// that streams write and wait for, streams that share a hardware queue, a peer that is killed.
//
//     nvcc -O2 -o ipc_probe ipc_probe.cu && ./ipc_probe [DEVICE_OF_RANK_0 DEVICE_OF_RANK_1]
//
// Two processes, which begin as one: rank 0 sends, rank 1 receives and is killed in the end. Each answer is a line:
// question, tab, answer, tab, unit. A call that fails is an answer too. Exit status 1 where a rank came to no end.
#include <cuda.h>
#include <cuda_runtime.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kMemory = 64 * kMiB;
constexpr unsigned kSlots = 3;
constexpr double kPatience = 20;  // seconds that a rank waits for the other
constexpr double kHangs = 0.3;    // seconds after which a stream counts as held up

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// One line of the results.
void answer(const std::string& question, const char* unit, const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  printf("%s\t%s\t%s\n", question.c_str(), text, unit);
  fflush(stdout);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

void check(CUresult error, const char* what) {
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(what) + ": driver error " + std::to_string(static_cast<int>(error)));
  }
}

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("the driver has no ") + name);
  }
  return reinterpret_cast<Function>(found);
}

/// The driver's functions, so that nothing is linked with libcuda.
struct Driver {
#define FROM_DRIVER(member, name) decltype(&name) member = driver_function<decltype(&name)>(#name)
  FROM_DRIVER(create, cuMemCreate);
  FROM_DRIVER(export_handle, cuMemExportToShareableHandle);
  FROM_DRIVER(import_handle, cuMemImportFromShareableHandle);
  FROM_DRIVER(reserve, cuMemAddressReserve);
  FROM_DRIVER(map, cuMemMap);
  FROM_DRIVER(set_access, cuMemSetAccess);
  FROM_DRIVER(granularity, cuMemGetAllocationGranularity);
  FROM_DRIVER(write_value, cuStreamWriteValue32);
  FROM_DRIVER(wait_value, cuStreamWaitValue32);
#undef FROM_DRIVER
};

/// What both ranks map; made before there are two.
struct Board {
  std::atomic<int> meetings[2];
  std::atomic<int> pids[2];
  std::atomic<int> fd;
  std::atomic<bool> has_ended[2];
  alignas(4096) std::atomic<uint32_t> numbers[1024];
};

/// Which numbers of the board mean what; a cache line each.
enum Number : size_t { kArrived = 0, kFreed = 16, kHeld = 32, kForSender = 48, kForReceiver = 64 };

__global__ void fill(uint32_t* words, uint32_t value, size_t count) {
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    words[i] = value;
  }
}

__global__ void count_others(const uint32_t* words, uint32_t value, size_t count, uint32_t* others) {
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    if (words[i] != value) {
      atomicAdd(others, 1U);
    }
  }
}

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) { check(cudaMalloc(&memory_, bytes), "cudaMalloc"); }
  ~DeviceMemory() { cudaFree(memory_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  uint32_t* words() const { return static_cast<uint32_t*>(memory_); }

 private:
  void* memory_ = nullptr;
};

/// One rank: asks the questions one after the other, in step with its peer.
class Rank {
 public:
  Rank(Board& board, int rank, const int (&devices)[2])
      : board_(board), rank_(rank), device_(devices[rank]), receivers_device_(devices[1]) {
    check(cudaSetDevice(device_), "cudaSetDevice");
    check(cudaFree(nullptr), "making a context");
    board_.pids[rank_] = getpid();
    meet();
  }

  void run() {
    memory_ = shared_memory();
    check(cudaHostRegister(board_.numbers, sizeof(board_.numbers), cudaHostRegisterMapped | cudaHostRegisterPortable),
          "cudaHostRegister");
    void* seen = nullptr;
    check(cudaHostGetDevicePointer(&seen, board_.numbers, 0), "cudaHostGetDevicePointer");
    numbers_ = reinterpret_cast<CUdeviceptr>(seen);
    if (rank_ == 0) {
      answer("host memory registered by both processes", "", "works");
    }
    messages(1024, 2000, false);
    messages(kMiB, 1000, false);
    messages(16 * kMiB, 100, false);
    messages(kMiB, 300, true);
    held_up_streams();
    meet();
    killed_peer();
  }

 private:
  /// Both hosts come here.
  void meet() {
    const int mine = ++board_.meetings[rank_];
    const double begin = now();
    while (board_.meetings[1 - rank_] < mine) {
      if (now() - begin > kPatience || board_.has_ended[1 - rank_]) {
        throw std::runtime_error("the other rank does not come");
      }
      std::this_thread::yield();
    }
  }

  CUdeviceptr at(Number number) const { return numbers_ + number * sizeof(uint32_t); }

  /// Memory of the receiver's device that the sender makes and both map, as a device channel has it.
  CUdeviceptr shared_memory() {
    CUmemAllocationProp wanted = {};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    wanted.location.id = receivers_device_;
    wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemGenericAllocationHandle allocation = 0;
    if (rank_ == 0) {
      size_t granularity = 0;
      check(driver_.granularity(&granularity, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
            "cuMemGetAllocationGranularity");
      answer("least memory that can be exported", "KiB", "%zu", granularity >> 10);
      check(driver_.create(&allocation, kMemory, &wanted, 0), "cuMemCreate");
      int fd = -1;
      check(driver_.export_handle(&fd, allocation, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
            "cuMemExportToShareableHandle");
      board_.fd = fd;
      meet();  // it is there
      meet();  // it has been opened
      close(fd);
    } else {
      meet();
      const int process = static_cast<int>(syscall(SYS_pidfd_open, board_.pids[0].load(), 0));
      const int fd = process < 0 ? -1 : static_cast<int>(syscall(SYS_pidfd_getfd, process, board_.fd.load(), 0));
      answer("pidfd_getfd of an exported handle", "", "%s", fd >= 0 ? "works" : strerror(errno));
      if (fd < 0) {
        throw std::runtime_error("device channels cannot be opened");
      }
      const CUresult imported = driver_.import_handle(&allocation, reinterpret_cast<void*>(static_cast<uintptr_t>(fd)),
                                                      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
      answer("import of the handle", "", imported == CUDA_SUCCESS ? "works" : "error %d", static_cast<int>(imported));
      check(imported, "cuMemImportFromShareableHandle");
      close(fd);
      close(process);
      meet();
    }
    CUdeviceptr address = 0;
    check(driver_.reserve(&address, kMemory, 0, 0, 0), "cuMemAddressReserve");
    check(driver_.map(address, kMemory, 0, allocation, 0), "cuMemMap");
    CUmemAccessDesc access = {};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device_;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    check(driver_.set_access(address, kMemory, &access, 1), "cuMemSetAccess");
    return address;
  }

  /// Messages through a few slots. All waits are the streams', so both hosts run far ahead.
  void messages(size_t bytes, int count, bool checked) {
    if (rank_ == 0) {
      board_.numbers[kArrived] = board_.numbers[kFreed] = 0;
    }
    const Stream lane;
    const DeviceMemory own(bytes);
    const DeviceMemory others(sizeof(uint32_t));
    check(cudaMemset(others.words(), 0, sizeof(uint32_t)), "cudaMemset");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    meet();
    const double begin = now();
    for (int i = 0; i < count; ++i) {
      auto* slot = reinterpret_cast<uint32_t*>(memory_ + i % kSlots * bytes);
      if (rank_ == 0) {
        if (checked) {
          fill<<<64, 256, 0, lane>>>(own.words(), i, bytes / sizeof(uint32_t));
        }
        if (i >= static_cast<int>(kSlots)) {
          wait(lane, kFreed, i - kSlots + 1);
        }
        check(cudaMemcpyAsync(slot, own.words(), bytes, cudaMemcpyDeviceToDevice, lane), "cudaMemcpyAsync");
        write(lane, kArrived, i + 1);
      } else {
        wait(lane, kArrived, i + 1);
        if (checked) {
          count_others<<<64, 256, 0, lane>>>(slot, i, bytes / sizeof(uint32_t), others.words());
        }
        write(lane, kFreed, i + 1);
      }
    }
    const double queued = now() - begin;
    check(cudaStreamSynchronize(lane), "cudaStreamSynchronize");
    const double done = now() - begin;
    meet();
    const std::string size = bytes < kMiB ? std::to_string(bytes >> 10) + " KiB" : std::to_string(bytes >> 20) + " MiB";
    if (rank_ == 1 && checked) {
      uint32_t found = 0;
      check(cudaMemcpy(&found, others.words(), sizeof(found), cudaMemcpyDeviceToHost), "cudaMemcpy");
      answer("wrong words in messages of " + size, "", "%u", found);
    } else if (rank_ == 0 && !checked) {
      answer("a message of " + size + ", queued", "us", "%.2f", 1e6 * queued / count);
      answer("a message of " + size + ", done", "us", "%.2f", 1e6 * done / count);
      answer("a message of " + size + ", speed", "GB/s", "%.2f", static_cast<double>(bytes) * count / done / 1e9);
    }
    meet();
  }

  /// How many streams may wait for numbers before another one does not run: they share the queues of the hardware.
  void held_up_streams() {
    if (rank_ != 0) {
      return;
    }
    board_.numbers[kHeld] = 0;
    std::vector<Stream> waiting(64);
    std::vector<Stream> idle(64);
    const DeviceMemory word(sizeof(uint32_t));
    int held_up_by = -1;
    for (int i = 0; i < 64 && held_up_by < 0; ++i) {
      wait(waiting[i], kHeld, 1);
      fill<<<1, 1, 0, idle[i]>>>(word.words(), i, 1);
      const double begin = now();
      while (cudaStreamQuery(idle[i]) == cudaErrorNotReady && now() - begin < kHangs) {
        std::this_thread::yield();
      }
      held_up_by = now() - begin < kHangs ? -1 : i + 1;
    }
    const char* queues = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    const std::string question = "streams that wait before another is held up, CUDA_DEVICE_MAX_CONNECTIONS ";
    answer(question + (queues == nullptr ? "unset" : queues), "", held_up_by < 0 ? "none of 64" : "%d", held_up_by);
    board_.numbers[kHeld] = 1;
    const double begin = now();
    check(cudaDeviceSynchronize(), "streams let go by the host");
    answer("a store by the host lets them all go", "ms", "%.3f", 1e3 * (now() - begin));
  }

  /// Rank 1 is killed while a stream of each waits for the other.
  void killed_peer() {
    const Stream lane;
    board_.numbers[rank_ == 0 ? kForSender : kForReceiver] = 0;
    meet();
    wait(lane, rank_ == 0 ? kForSender : kForReceiver, 1);
    const auto from = reinterpret_cast<void*>(memory_ + kMiB);
    check(cudaMemcpyAsync(reinterpret_cast<void*>(memory_), from, kMiB, cudaMemcpyDeviceToDevice, lane),
          "cudaMemcpyAsync");
    meet();
    if (rank_ == 1) {
      kill(getpid(), SIGKILL);
    }
    const double killed = now();
    bool gone = false;
    while (!gone && now() - killed < kPatience) {
      gone = waitpid(board_.pids[1], nullptr, WNOHANG) == board_.pids[1];
      usleep(1000);
    }
    answer("a killed rank, its stream waiting, is gone after", "s", gone ? "%.3f" : "not in %.0f", now() - killed);
    answer("the stream that waits for the dead", "", "%s", cudaGetErrorName(cudaStreamQuery(lane)));
    board_.numbers[kForSender] = 1;
    const double stored = now();
    check(cudaStreamSynchronize(lane), "a stream that waited for the dead");
    answer("a store by the host lets it go", "ms", "%.3f", 1e3 * (now() - stored));
    fill<<<64, 256, 0, lane>>>(reinterpret_cast<uint32_t*>(memory_), 7, kMemory / sizeof(uint32_t));
    answer("memory shared with the dead", "", "%s", cudaGetErrorName(cudaStreamSynchronize(lane)));
  }

  void write(cudaStream_t stream, Number number, uint32_t value) {
    check(driver_.write_value(stream, at(number), value, CU_STREAM_WRITE_VALUE_DEFAULT), "cuStreamWriteValue32");
  }

  void wait(cudaStream_t stream, Number number, uint32_t value) {
    check(driver_.wait_value(stream, at(number), value, CU_STREAM_WAIT_VALUE_GEQ), "cuStreamWaitValue32");
  }

  Board& board_;
  int rank_;
  int device_;
  int receivers_device_;
  Driver driver_;
  CUdeviceptr memory_ = 0;
  CUdeviceptr numbers_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  const int devices[2] = {count > 2 ? atoi(arguments[1]) : 0, count > 2 ? atoi(arguments[2]) : 0};
  const int fd = memfd_create("ipc_probe", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, sizeof(Board)) != 0) {
    perror("memfd_create");
    return 1;
  }
  void* mapped = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapped == MAP_FAILED) {
    perror("mmap");
    return 1;
  }
  auto* board = new (mapped) Board{};
  const int child = fork();  // before either has touched CUDA
  const int rank = child == 0 ? 1 : 0;
  if (rank == 1) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
  }
  try {
    Rank(*board, rank, devices).run();
  } catch (const std::exception& error) {
    answer("rank " + std::to_string(rank) + " ended", "", "%s", error.what());
    board->has_ended[rank] = true;
    if (rank == 0) {
      kill(child, SIGKILL);
    }
    _exit(1);  // streams may wait for ever; nothing is to be torn down
  }
  return 0;
}
