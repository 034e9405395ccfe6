// The GEMM for tens of rows on Hopper, and some hundreds, which streams the weight as gemm_stream does, with wgmma and
// TMA. Compiled for sm_90a alone.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel stream_hopper_kernel();

}  // namespace qwen_plugins
