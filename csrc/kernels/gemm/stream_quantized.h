// The GEMM of quantized weights for up to 64 rows on Hopper, which streams the weight.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel stream_quantized_kernel();

}  // namespace qwen_plugins
