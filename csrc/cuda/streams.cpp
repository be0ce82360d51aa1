#include "cuda/streams.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace pp_runtime::cuda {

namespace {

struct Idle {
  std::mutex mutex;
  std::vector<c10::Stream> streams;
};

Idle& idle() {
  // Never destroyed: a stream may be given back while the process ends.
  static auto* kept = new Idle;
  return *kept;
}

}  // namespace

c10::Stream take_stream(c10::Device device) {
  {
    const std::lock_guard lock(idle().mutex);
    auto& streams = idle().streams;
    const auto found = std::find_if(streams.begin(), streams.end(),
                                    [&](const c10::Stream& stream) { return stream.device() == device; });
    if (found != streams.end()) {
      const c10::Stream stream = *found;
      streams.erase(found);
      return stream;
    }
  }
  const c10::cuda::CUDAGuard on(device);
  int lowest = 0;
  int highest = 0;
  C10_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
  cudaStream_t stream = nullptr;
  C10_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest));
  return c10::cuda::getStreamFromExternal(stream, device.index()).unwrap();
}

void give_back(const c10::Stream& stream) noexcept {
  try {
    if (c10::cuda::CUDAStream(stream).query()) {
      const std::lock_guard lock(idle().mutex);
      idle().streams.push_back(stream);
    }
  } catch (const std::exception&) {
    // The device failed, or the process is past using it.
  }
}

}  // namespace pp_runtime::cuda
