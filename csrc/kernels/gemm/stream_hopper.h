// The matrix product for tens of rows on Hopper, which streams the weight as gemm_stream does, through Hopper's own
// products and copies. Compiled for sm_90a alone; part of gemm.cu, which calls it where it can.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"
#include "kernels/common/launch.h"

namespace qwen_plugins {

// Up to this many rows.
constexpr int64_t kMaxHopperRows = 64;

// Whether the kernel can take such a product, and is no slower than cuBLASLt there: measured, docs/gemm.md.
bool has_hopper_gemm(const GemmParams& params, const DeviceProperties& device);

// cudaErrorNotSupported, with nothing launched, where the driver cannot describe the operands to the copy engine.
cudaError_t launch_gemm_hopper(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream);

}  // namespace qwen_plugins
