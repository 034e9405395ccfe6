#include <array>
#include <mutex>
#include <utility>

#include "launch.h"

namespace qwen_plugins {
namespace {

// What the driver says of it holds for all kernels: they are compiled for the same chips.
__global__ void compiled_as_all_are() {}

// Whether the code that this chip runs has the instructions that go with the attributes of Hopper's launches. Code for
// older chips, which the driver translates for this one, has not, and would not wait for the kernel before it.
bool is_compiled_for_hopper(const cudaFuncAttributes& code) {
  return code.binaryVersion >= 90 && (code.ptxVersion == 0 || code.ptxVersion >= 90);
}

cudaError_t query(int device, DeviceProperties& properties) {
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&properties.multiprocessors, cudaDevAttrMultiProcessorCount},
      {&properties.threads_per_multiprocessor, cudaDevAttrMaxThreadsPerMultiProcessor},
      {&properties.major, cudaDevAttrComputeCapabilityMajor},
      {&properties.max_shared_memory_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
  };
  for (const auto& [value, attribute] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) return error;
  }
  cudaFuncAttributes code{};
  if (const cudaError_t error = cudaFuncGetAttributes(&code, compiled_as_all_are); error != cudaSuccess) return error;
  properties.programmatic_launch = properties.major >= 9 && is_compiled_for_hopper(code);
  return cudaSuccess;
}

}  // namespace

cudaError_t current_device_properties(DeviceProperties& properties) {
  struct Known {
    bool known = false;
    DeviceProperties properties;
  };
  static std::mutex mutex;
  static std::array<Known, 64> devices;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device >= static_cast<int>(devices.size())) return query(device, properties);
  const std::lock_guard lock(mutex);
  Known& entry = devices[device];
  if (!entry.known) {
    if (const cudaError_t error = query(device, entry.properties); error != cudaSuccess) return error;
    entry.known = true;
  }
  properties = entry.properties;
  return cudaSuccess;
}

}  // namespace qwen_plugins
