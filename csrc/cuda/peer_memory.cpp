#include "cuda/peer_memory.h"

#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace pp_runtime::cuda {

namespace {

constexpr int kOldestDriver = 12000;

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, kOldestDriver, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string("this CUDA driver has no ") + name);
  }
  return reinterpret_cast<Function>(found);
}

/// The driver's functions, found once.
struct Driver {
  template <class Function>
  static Function find(const char* name) {
    return driver_function<Function>(name);
  }
  decltype(&cuGetErrorString) error_string = find<decltype(&cuGetErrorString)>("cuGetErrorString");
  decltype(&cuMemCreate) create = find<decltype(&cuMemCreate)>("cuMemCreate");
  decltype(&cuMemRelease) release = find<decltype(&cuMemRelease)>("cuMemRelease");
  decltype(&cuMemAddressReserve) reserve = find<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
  decltype(&cuMemAddressFree) free = find<decltype(&cuMemAddressFree)>("cuMemAddressFree");
  decltype(&cuMemMap) map = find<decltype(&cuMemMap)>("cuMemMap");
  decltype(&cuMemUnmap) unmap = find<decltype(&cuMemUnmap)>("cuMemUnmap");
  decltype(&cuMemSetAccess) set_access = find<decltype(&cuMemSetAccess)>("cuMemSetAccess");
  decltype(&cuMemGetAllocationGranularity) granularity =
      find<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
  decltype(&cuMemExportToShareableHandle) export_handle =
      find<decltype(&cuMemExportToShareableHandle)>("cuMemExportToShareableHandle");
  decltype(&cuMemImportFromShareableHandle) import_handle =
      find<decltype(&cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");
  decltype(&cuStreamWriteValue32) write_value = find<decltype(&cuStreamWriteValue32)>("cuStreamWriteValue32");
  decltype(&cuStreamWaitValue32) wait_value = find<decltype(&cuStreamWaitValue32)>("cuStreamWaitValue32");
};

const Driver& driver() {
  static const auto* found = new Driver;
  return *found;
}

void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS) {
    const char* text = nullptr;
    driver().error_string(result, &text);
    throw std::runtime_error(std::string(what) + " failed: " + (text == nullptr ? "unknown error" : text));
  }
}

void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) {
    cudaGetLastError();  // the next call of somebody else's must not find it
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(result));
  }
}

CUmemAllocationProp properties(int device) {
  CUmemAllocationProp made = {};
  made.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  made.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  made.location.id = device;
  made.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return made;
}

std::string uuid_of(int device) {
  cudaDeviceProp found = {};
  check(cudaGetDeviceProperties(&found, device), "cudaGetDeviceProperties");
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "GPU ";
  for (const char byte : found.uuid.bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

/// The device of this process that has the name; -1 for none.
int visible_device(const std::string& name) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int device = 0; device < count; ++device) {
    if (uuid_of(device) == name) {
      return device;
    }
  }
  return -1;
}

/// Maps an allocation for `device`; takes it over. `fd` is closed with the mapping, -1 is none.
at::Tensor mapped(CUmemGenericAllocationHandle allocation, size_t bytes, c10::Device device, int fd) {
  CUdeviceptr address = 0;
  bool is_mapped = false;
  try {
    check(driver().reserve(&address, bytes, 0, 0, 0), "cuMemAddressReserve");
    check(driver().map(address, bytes, 0, allocation, 0), "cuMemMap");
    is_mapped = true;
    CUmemAccessDesc access = {};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device.index();
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    check(driver().set_access(address, bytes, &access, 1), "cuMemSetAccess");
  } catch (const std::exception&) {
    if (is_mapped) {
      driver().unmap(address, bytes);
    }
    if (address != 0) {
      driver().free(address, bytes);
    }
    driver().release(allocation);
    if (fd >= 0) {
      close(fd);
    }
    throw;
  }
  // The mapping keeps the memory from here on. Who drops it has seen the device done with it.
  driver().release(allocation);
  const auto undo = [bytes, fd](void* pointer) {
    const auto mapping = reinterpret_cast<CUdeviceptr>(pointer);
    driver().unmap(mapping, bytes);
    driver().free(mapping, bytes);
    if (fd >= 0) {
      close(fd);
    }
  };
  return at::for_blob(reinterpret_cast<void*>(address), {static_cast<int64_t>(bytes)})
      .deleter(undo)
      .options(at::TensorOptions(at::kByte).device(device))
      .target_device(device)
      .make_tensor();
}

size_t rounded(size_t bytes, const CUmemAllocationProp& of) {
  size_t granularity = 0;
  check(driver().granularity(&granularity, &of, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "cuMemGetAllocationGranularity");
  return (bytes + granularity - 1) / granularity * granularity;
}

CUstream raw(const c10::Stream& stream) { return c10::cuda::CUDAStream(stream).stream(); }

}  // namespace

CudaPeerMemory::CudaPeerMemory(c10::Device device)
    : device_(device.has_index() ? device : c10::Device(c10::kCUDA, c10::cuda::current_device())),
      name_(uuid_of(device_.index())) {
  driver();
}

PeerMemory::Mapping CudaPeerMemory::allocate(const std::string& device, size_t bytes) {
  const c10::cuda::CUDAGuard on(device_);
  const int location = visible_device(device);
  if (location < 0) {
    throw std::runtime_error("this process does not see the " + device + " (CUDA_VISIBLE_DEVICES)");
  }
  const CUmemAllocationProp wanted = properties(location);
  const size_t size = rounded(bytes, wanted);
  CUmemGenericAllocationHandle allocation = 0;
  check(driver().create(&allocation, size, &wanted, 0), "cuMemCreate");
  int fd = -1;
  const CUresult exported = driver().export_handle(&fd, allocation, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (exported != CUDA_SUCCESS) {
    driver().release(allocation);
    check(exported, "cuMemExportToShareableHandle");
  }
  return {.bytes = mapped(allocation, size, device_, fd).narrow(0, 0, static_cast<int64_t>(bytes)), .fd = fd};
}

at::Tensor CudaPeerMemory::open(const Handle& handle) {
  const c10::cuda::CUDAGuard on(device_);
  // Not through /proc/<pid>/fd: that would open the device file anew.
  const int process = static_cast<int>(syscall(SYS_pidfd_open, handle.pid, 0));
  const int fd = process < 0 ? -1 : static_cast<int>(syscall(SYS_pidfd_getfd, process, handle.fd, 0));
  const int error = errno;
  if (process >= 0) {
    close(process);
  }
  if (fd < 0) {
    throw std::runtime_error(std::string("the peer's memory cannot be opened: ") + std::strerror(error));
  }
  CUmemGenericAllocationHandle allocation = 0;
  const CUresult imported = driver().import_handle(&allocation, reinterpret_cast<void*>(static_cast<uintptr_t>(fd)),
                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  close(fd);
  check(imported, "cuMemImportFromShareableHandle");
  const size_t size = rounded(handle.bytes, properties(device_.index()));
  return mapped(allocation, size, device_, -1).narrow(0, 0, static_cast<int64_t>(handle.bytes));
}

void CudaPeerMemory::adopt(void* host_memory, size_t bytes) {
  const c10::cuda::CUDAGuard on(device_);
  check(cudaHostRegister(host_memory, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable), "cudaHostRegister");
  void* found = nullptr;
  check(cudaHostGetDevicePointer(&found, host_memory, 0), "cudaHostGetDevicePointer");
  const std::lock_guard lock(mutex_);
  adopted_[reinterpret_cast<uintptr_t>(host_memory)] = {.bytes = bytes,
                                                        .device_address = reinterpret_cast<uintptr_t>(found)};
}

void CudaPeerMemory::forget(void* host_memory) noexcept {
  if (cudaHostUnregister(host_memory) != cudaSuccess) {
    cudaGetLastError();  // the process is past using the device
  }
  const std::lock_guard lock(mutex_);
  adopted_.erase(reinterpret_cast<uintptr_t>(host_memory));
}

uintptr_t CudaPeerMemory::on_device(const void* number) {
  const auto address = reinterpret_cast<uintptr_t>(number);
  const std::lock_guard lock(mutex_);
  auto after = adopted_.upper_bound(address);
  if (after == adopted_.begin() || address - std::prev(after)->first >= std::prev(after)->second.bytes) {
    throw std::logic_error("a stream is to wait for a number in host memory that was not adopted");
  }
  --after;
  return after->second.device_address + (address - after->first);
}

void CudaPeerMemory::write(const c10::Stream& stream, std::atomic<uint32_t>& number, uint32_t value) {
  const c10::cuda::CUDAGuard on(device_);
  check(driver().write_value(raw(stream), on_device(&number), value, CU_STREAM_WRITE_VALUE_DEFAULT),
        "cuStreamWriteValue32");
}

void CudaPeerMemory::wait(const c10::Stream& stream, const std::atomic<uint32_t>& number, uint32_t value) {
  const c10::cuda::CUDAGuard on(device_);
  check(driver().wait_value(raw(stream), on_device(&number), value, CU_STREAM_WAIT_VALUE_GEQ), "cuStreamWaitValue32");
}

}  // namespace pp_runtime::cuda
