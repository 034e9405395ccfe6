// The GEMM of 8-bit x and 8-bit weights for tens of rows and more on Hopper. Compiled for sm_90a alone.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel tiles_eight_bit_kernel();

}  // namespace qwen_plugins
