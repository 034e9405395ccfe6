// Attention of prompts with wgmma: for 16-bit types and head sizes of 64 or 128, on compute capability 9.0. Compiled
// for sm_90a alone; prefill.cu calls it.
#pragma once

#include "kernels/common/launch.h"
#include "prefill.h"

namespace qwen_plugins {

struct PrefillArguments;

// Whether the kernel can compute attention with these heads on this device.
bool takes_prefill_hopper(const AttentionHeads& heads, const DeviceProperties& device);

// Launches the second kernel of prefill.h.
cudaError_t launch_prefill_hopper(const PrefillArguments& arguments, const DeviceProperties& device,
                                  cudaStream_t stream);

}  // namespace qwen_plugins
