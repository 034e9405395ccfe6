#include <array>
#include <mutex>

#include "launch.h"

namespace qwen_plugins {
namespace {

cudaError_t query(int device, DeviceProperties& properties) {
  cudaError_t error = cudaDeviceGetAttribute(&properties.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&properties.threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&properties.major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&properties.max_shared_memory_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device);
  }
  properties.programmatic_launch = properties.major >= 9;
  return error;
}

}  // namespace

cudaError_t current_device_properties(DeviceProperties& properties) {
  struct Known {
    std::once_flag once;
    cudaError_t error;
    DeviceProperties properties;
  };
  static std::array<Known, 64> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device >= static_cast<int>(known.size())) return query(device, properties);
  Known& entry = known[device];
  std::call_once(entry.once, [&] { entry.error = query(device, entry.properties); });
  properties = entry.properties;
  return entry.error;
}

}  // namespace qwen_plugins
