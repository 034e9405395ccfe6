// The streaming GEMM of 8-bit x and 8-bit weights in rows, for up to some tens of rows on Hopper. Compiled for sm_90a
// alone.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel stream_eight_bit_kernel();

}  // namespace qwen_plugins
