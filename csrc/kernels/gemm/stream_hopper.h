// The GEMM for tens of rows on Hopper, which streams the weight as gemm_stream does, with wgmma and TMA. Compiled for
// sm_90a alone; gemm.cu calls it.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"
#include "kernels/common/launch.h"

namespace qwen_plugins {

// Rows of x that one launch can compute.
constexpr int64_t kMaxStreamHopperRows = 64;

// Whether the kernel can compute this GEMM, and is no slower than cuBLASLt at it (measured: docs/gemm.md).
bool takes_gemm_stream_hopper(const GemmParams& params, const DeviceProperties& device);

// cudaErrorNotSupported, with nothing launched, where the driver cannot encode the operands' tensor maps.
cudaError_t launch_gemm_stream_hopper(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream);

}  // namespace qwen_plugins
