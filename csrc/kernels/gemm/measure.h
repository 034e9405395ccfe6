// Measures how long GEMM kernels take on the current device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels/common/api.h"

namespace qwen_plugins {

// Raised with every change that makes a GEMM kernel faster or slower: measurements of another version say nothing.
constexpr int32_t kGemmKernelsVersion = 6;

struct GemmMeasurements {
  std::vector<float> microseconds;  // of each choice; 0 where it cannot compute the GEMM
  int64_t device_bytes = 0;         // that the measurement allocates; known also after cudaErrorMemoryAllocation
};

// Measures each choice as a decode step runs it: launch after launch of a CUDA graph, on weights that the L2 cache does
// not hold. A figure is the median of several replays, which the choices take in turn, and takes some 5 ms (with GEMMs
// that take longer than half a millisecond: the time of twenty).
//
// Blocks until the device has finished, and allocates weights of up to 512 MB (or one, if it is larger), operands and
// workspace, all of which is freed again. Work in other streams goes on, but slows the measurement down, as the
// measurement slows it. May be called while a stream is captured.
QWEN_PLUGINS_API cudaError_t measure_gemm(const GemmShape& shape, bool has_bias, const std::vector<GemmChoice>& choices,
                                          GemmMeasurements* measurements);

}  // namespace qwen_plugins
