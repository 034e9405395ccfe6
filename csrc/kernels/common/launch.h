// What the launchers share: facts about the current device, and launches with the attributes of Hopper and later.
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
  // The device has programmatic dependent launch and clusters (Hopper and later), and the code that it runs was
  // compiled for such a device.
  bool programmatic_launch;
};

// Gives the properties of the calling thread's current device, which are read from the driver once for each device.
cudaError_t current_device_properties(DeviceProperties& properties);

// A launch configuration together with the attributes that it points to.
class LaunchConfig {
 public:
  // `cluster`: blocks of a cluster, along x. Attributes that the device does not have are left out.
  LaunchConfig(dim3 blocks, dim3 threads, size_t shared_bytes, int cluster, const DeviceProperties& device,
               cudaStream_t stream);
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2]{};
};

// Launches with programmatic dependent launch where the device has it, so that the kernel may start while the one
// before it in the stream still runs, and in clusters of `cluster` blocks, a divisor of blocks.x. Every kernel launched
// with this calls wait_for_previous_kernel(): programmatic_launch.cuh says before what.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_clusters(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, int cluster,
                            const DeviceProperties& device, cudaStream_t stream, Arguments&&... arguments) {
  const LaunchConfig config(blocks, threads, shared_bytes, cluster, device, stream);
  return cudaLaunchKernelEx(config.get(), kernel, std::forward<Arguments>(arguments)...);
}

// Likewise without clusters.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes,
                          const DeviceProperties& device, cudaStream_t stream, Arguments&&... arguments) {
  return launch_clusters(kernel, blocks, threads, shared_bytes, 1, device, stream,
                         std::forward<Arguments>(arguments)...);
}

// Gives how many clusters of `cluster` blocks of `kernel` run at once; 0 where the device, or a MIG instance of it, has
// no room for one.
cudaError_t max_active_clusters(const void* kernel, int cluster, int threads, size_t shared_bytes,
                                const DeviceProperties& device, int* clusters);

}  // namespace qwen_plugins
