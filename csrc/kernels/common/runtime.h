// The functions of the CUDA runtime that plug-ins and bindings call. The library of kernels exports them, so that none
// of its users links a runtime of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/common/api.h"

namespace qwen_plugins {

// cudaGetErrorString, cudaMemcpyAsync and cudaStreamSynchronize.
QWEN_PLUGINS_API const char* error_string(cudaError_t error);
QWEN_PLUGINS_API cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                        cudaStream_t stream);
QWEN_PLUGINS_API cudaError_t synchronize(cudaStream_t stream);

}  // namespace qwen_plugins
