// The GEMM for many rows, by cuBLASLt.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

// The workspace that cuBLASLt is given: as much as cuBLAS itself takes on Hopper.
constexpr int64_t kCublasLtWorkspaceBytes = int64_t{32} << 20;

bool has_cublas_lt();

// z [rows, out_features], with that row stride, = x · weight^T + bias, with a weight of the type of x; params'
// activation and y are not used. Of codes z is the sums alone, int32 or float32, without scales and bias. The workspace
// has kCublasLtWorkspaceBytes. The variants are those of the kernel below.
// cudaErrorNotSupported, with nothing launched, where cuBLASLt cannot be loaded or has no such algorithm for this GEMM.
cudaError_t launch_cublas_lt(const GemmParams& params, int32_t variant, void* z, int64_t z_row_stride,
                             cudaStream_t stream);

// With SwiGLU a kernel of its own follows. A variant is an algorithm that cuBLASLt proposes: 1 the one that it expects
// to be the fastest, 2 the next and so on. cudaErrorNotSupported, with nothing launched, where it proposes fewer.
GemmKernel cublas_lt_kernel();

}  // namespace qwen_plugins
