#include <array>
#include <mutex>
#include <utility>

#include "launch.h"

namespace qwen_plugins {
namespace {

// An empty kernel, whose attributes tell the architecture of the code that the driver has loaded for this device.
__global__ void compiled_as_all_are() {}

// Whether the code that this device runs has the instructions that programmatic dependent launch and clusters need.
// Code that the driver compiled from PTX for an older architecture has not: such a kernel would not wait for the one
// before it.
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

LaunchConfig::LaunchConfig(dim3 blocks, dim3 threads, size_t shared_bytes, int cluster, const DeviceProperties& device,
                           cudaStream_t stream) {
  config_.gridDim = blocks;
  config_.blockDim = threads;
  config_.dynamicSmemBytes = shared_bytes;
  config_.stream = stream;
  config_.attrs = attributes_;
  if (!device.programmatic_launch) return;
  cudaLaunchAttribute& programmatic = attributes_[config_.numAttrs++];
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  if (cluster == 1) return;
  cudaLaunchAttribute& dimension = attributes_[config_.numAttrs++];
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
}

cudaError_t max_active_clusters(const void* kernel, int cluster, int threads, size_t shared_bytes,
                                const DeviceProperties& device, int* clusters) {
  const LaunchConfig config(dim3(static_cast<unsigned>(cluster)), dim3(static_cast<unsigned>(threads)), shared_bytes,
                            cluster, device, nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, config.get());
  if (error != cudaErrorInvalidClusterSize) return error;
  cudaGetLastError();  // clears the error, which here is an answer and not a fault
  *clusters = 0;
  return cudaSuccess;
}

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
