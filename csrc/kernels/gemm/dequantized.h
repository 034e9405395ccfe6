// The GEMM for many rows with quantized weights where no kernel of ours is for it: parts of the weight are dequantized
// into the workspace, one after the other, and multiplied by cuBLASLt.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel dequantized_kernel();

}  // namespace qwen_plugins
