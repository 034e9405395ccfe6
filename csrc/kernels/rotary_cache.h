// Before attention over prompts: q and k made ready in place, and k and v written to the cache, in one pass.
#pragma once

#include "attention_heads.h"

namespace qwen_plugins {

struct RotaryCacheParams {
  AttentionHeads heads;
  KvCache cache;
  void* qkv = nullptr;                 // [tokens, num_heads + 2 * num_kv_heads, head_size]: q and k change in place
  int64_t qkv_row_stride = 0;          // elements
  const int32_t* sequences = nullptr;  // [tokens]: the row of the cache that each token goes to
  const int32_t* positions = nullptr;  // [tokens]: its position there, below max_positions
  int64_t tokens = 0;                  // 0 launches nothing
};

// Launches on `stream` and returns at once: no synchronisation, no allocation. cudaErrorInvalidValue for parameters
// outside of what is written above and in attention_heads.h, otherwise what the launch returned.
cudaError_t launch_rotary_cache(const RotaryCacheParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
