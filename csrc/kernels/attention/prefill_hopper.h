// Attention of prompts with Hopper's own products: for 16-bit types and heads of 64 or 128, on compute capability 9.0.
// Compiled for sm_90a alone; part of prefill_attention.cu, which calls it where it can.
#pragma once

#include "kernels/common/launch.h"
#include "prefill.h"

namespace qwen_plugins {

bool has_hopper_kernel(const AttentionHeads& heads, const DeviceProperties& device);

// The second kernel of prefill_attention.h.
cudaError_t launch_hopper_attention(const PrefillAttentionParams& params, const DeviceProperties& device,
                                    cudaStream_t stream);

}  // namespace qwen_plugins
