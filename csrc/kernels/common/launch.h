// What the launchers share: facts about the current device, and a launch with the programmatic attribute.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <utility>

namespace qwen_plugins {

struct DeviceProperties {
  int major;  // of the compute capability
  int multiprocessors;
  int threads_per_multiprocessor;
  int max_shared_memory_per_block;  // with the opt-in
  bool programmatic_launch;         // Hopper and later, with code for it; the same chips have clusters
};

// Of the calling thread's current device; read from the driver once for each device.
cudaError_t current_device_properties(DeviceProperties& properties);

// Launches so that the kernel may start while the one before it in the stream still runs, where the chip can. Every
// kernel launched with this calls wait_for_previous_kernel(): programmatic_launch.cuh says before what.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
                          const DeviceProperties& device, cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device.programmatic_launch ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace qwen_plugins
