// The GEMM for many rows, by cuBLASLt.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

// With SwiGLU a kernel of its own follows. A variant is an algorithm that cuBLASLt proposes: 1 the one that it expects
// to be the fastest, 2 the next and so on. cudaErrorNotSupported, with nothing launched, where it proposes fewer.
GemmKernel cublas_lt_kernel();

}  // namespace qwen_plugins
