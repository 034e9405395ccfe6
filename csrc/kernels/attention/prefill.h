// Causal attention of prompts over packed sequences: what the host can launch.
//
// Two kernels run. The first normalises and rotates q and k (heads.h), writes k and v to the cache, and q to where the
// context will be, or to memory of its own. The second is attention on tensor cores with an online softmax (Dao,
// "FlashAttention-2", 2023): it reads q there and keys and values from the cache, and writes the context. No score
// matrix is written to memory.
#pragma once

#include "heads.h"
#include "kernels/common/api.h"

namespace qwen_plugins {

// The limits of one launch's grid.
constexpr int64_t kMaxPrefillTokens = 1 << 21;
constexpr int32_t kMaxPrefillSequences = 1 << 14;

struct PrefillAttentionParams {
  AttentionHeads heads;
  KvCache cache;
  const void* qkv = nullptr;   // [tokens, num_heads + 2 * num_kv_heads, head_size]
  int64_t qkv_row_stride = 0;  // elements
  void* context = nullptr;     // [tokens, num_heads, head_size], contiguous, 16-byte aligned
  // [tokens, num_heads, head_size], dtype of the heads, 16-byte aligned: where q is between the two kernels. Null: in
  // the context, which has no room for it where it has codes.
  void* queries = nullptr;
  // One float32 on the device, above 0: the context has codes of 8 bits, saturate(round(element * (1 / scale))) to
  // nearest even. Null: it is of the type of the heads.
  const float* context_scale = nullptr;
  DataType context_dtype = DataType::kInt8;  // kInt8 or kFloat8E4M3: of the codes
  // [sequences + 1], on the device: 0, then the sums of the sequences' lengths. Tokens from the last of them on are
  // padding: nothing of them is cached, and what is written to their context does not matter.
  const int32_t* cu_seqlens = nullptr;
  const int32_t* past_lengths = nullptr;  // [sequences], on the device: tokens in the cache before these; null: none
  int32_t sequences = 0;                  // at most kMaxPrefillSequences
  int64_t tokens = 0;                     // rows of qkv and context, at most kMaxPrefillTokens; 0 launches nothing
  float softmax_scale = 1.0F;             // above 0; usually 1 / sqrt(head_size)
};

// Launches on `stream` and returns at once: no synchronisation, no allocation; nothing on the host depends on the
// lengths but `tokens`. cudaErrorInvalidValue for parameters outside of what is written above and in heads.h, otherwise
// what the launch returned.
QWEN_PLUGINS_API cudaError_t launch_prefill_attention(const PrefillAttentionParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
