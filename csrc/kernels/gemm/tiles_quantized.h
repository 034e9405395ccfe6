// The GEMM for tens of rows and more with int4 and int8 weights on Hopper. Compiled for sm_90a alone.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel tiles_quantized_kernel();

}  // namespace qwen_plugins
