// The GEMM for tens of rows on Hopper, which streams the weight as gemm_stream does, with wgmma and TMA. Compiled for
// sm_90a alone.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

// Rows of x that one launch can compute.
constexpr int64_t kMaxStreamHopperRows = 64;

GemmKernel stream_hopper_kernel();

}  // namespace qwen_plugins
