// The GEMM of 8-bit x and 8-bit weights by cuBLASLt, for GPUs without a kernel of this library for many rows.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

// cuBLASLt writes sums to the workspace, some rows at a time, to which a second kernel applies scales, bias, SwiGLU and
// quantization. Weights with scales for each row alone.
GemmKernel cublas_lt_eight_bit_kernel();

}  // namespace qwen_plugins
