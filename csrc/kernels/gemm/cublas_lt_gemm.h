// The GEMM for many rows, by cuBLASLt.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm.h"

namespace qwen_plugins {

// The workspace that cuBLASLt is given: as much as cuBLAS itself takes on Hopper.
constexpr int64_t kCublasLtWorkspaceBytes = int64_t{32} << 20;

// z [rows, out_features] = x · weight^T + bias; params' activation and y are not used. The workspace has
// kCublasLtWorkspaceBytes. cudaErrorNotSupported, with nothing launched, where cuBLASLt cannot be loaded or has no
// algorithm for this GEMM.
cudaError_t launch_gemm_cublas_lt(const GemmParams& params, void* z, void* workspace, cudaStream_t stream);

}  // namespace qwen_plugins
