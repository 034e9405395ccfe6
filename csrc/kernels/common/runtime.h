// The functions of the CUDA runtime that plug-ins and bindings call. The library of kernels exports them, so that none
// of its users links a runtime of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "kernels/common/api.h"

namespace qwen_plugins {

// cudaGetErrorString, cudaMemcpyAsync and cudaStreamSynchronize.
QWEN_PLUGINS_API const char* error_string(cudaError_t error);
QWEN_PLUGINS_API cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                        cudaStream_t stream);
QWEN_PLUGINS_API cudaError_t synchronize(cudaStream_t stream);

struct DeviceDescription {
  std::string name;
  int multiprocessors = 0;
  int driver_version = 0;  // as cudaDriverGetVersion: 13000 for a driver of CUDA 13.0
};
// Describes the current device.
QWEN_PLUGINS_API cudaError_t describe_device(DeviceDescription* description);

}  // namespace qwen_plugins
