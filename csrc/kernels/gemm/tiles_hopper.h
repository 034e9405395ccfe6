// The matrix product for hundreds of rows and more on Hopper. Compiled for sm_90a alone; part of gemm.cu, which calls
// it where it can.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm.h"
#include "kernels/common/launch.h"

namespace qwen_plugins {

// Whether the kernel can take such a product, and was seen to be no slower than cuBLASLt there: docs/gemm.md.
bool has_hopper_tiles_gemm(const GemmParams& params, const DeviceProperties& device);

// cudaErrorNotSupported, with nothing launched, where the driver cannot describe the operands to the copy engine.
cudaError_t launch_gemm_hopper_tiles(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream);

}  // namespace qwen_plugins
