#include "runtime.h"

namespace qwen_plugins {

const char* error_string(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, kind, stream);
}

cudaError_t synchronize(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t describe_device(DeviceDescription* description) {
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device); error != cudaSuccess) return error;
  description->name = properties.name;
  description->multiprocessors = properties.multiProcessorCount;
  return cudaDriverGetVersion(&description->driver_version);
}

}  // namespace qwen_plugins
