// The GEMM for any type, size and alignment: correct, and slow.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"

namespace qwen_plugins {

cudaError_t launch_gemm_plain(const GemmParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
