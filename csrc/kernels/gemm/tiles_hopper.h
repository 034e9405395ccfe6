// The GEMM for hundreds of rows and more on Hopper, with wgmma and TMA. Compiled for sm_90a alone.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel tiles_hopper_kernel();

}  // namespace qwen_plugins
