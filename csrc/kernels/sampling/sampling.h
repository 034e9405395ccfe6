// Choosing the next token of each sequence from its logits: what the host can launch.
//
// In this order, as transformers does: the repetition penalty, the temperature, the k most likely tokens, of those the
// most likely ones that together have probability top_p (the one that reaches it included), a draw. The same logits,
// settings, step and place in the batch give the same token, whatever else is in the batch. Of equal logits at a limit
// those of the lower tokens stay. Logits may be -infinity; a row that has NaN or +infinity, or nothing but -infinity,
// gives kNoToken.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

// The settings of a draw. They are in device memory, so that one CUDA graph serves every request.
struct SamplingSettings {
  float temperature = 1.0F;  // above 0
  float top_p = 1.0F;        // above 0, at most 1
  float repetition_penalty = 1.0F;
  int32_t top_k = 0;  // 0: all
  uint64_t seed = 0;
  uint64_t step = 0;  // number of the next draw with this seed; every launch with settings adds 1
};

constexpr int32_t kMaxVocabSize = 1 << 19;
constexpr int32_t kNoToken = -1;

struct SamplingParams {
  const void* logits = nullptr;          // [sequences, vocab_size], dtype
  int64_t logits_row_stride = 0;         // elements
  int32_t sequences = 0;                 // 0 launches nothing
  int32_t vocab_size = 0;                // at most kMaxVocabSize
  DataType dtype = DataType::kFloat16;   // kFloat32, kFloat16 or kBFloat16
  SamplingSettings* settings = nullptr;  // on the device; null: the largest logit, the first of equal ones
  bool greedy = false;                   // with settings: the largest logit after the repetition penalty
  uint32_t* seen = nullptr;              // [sequences, (vocab_size + 31) / 32]: a bit for each token that the penalty
                                         // holds for; the chosen token's is set. Null: no penalty
  int32_t* tokens = nullptr;             // [sequences]: the result, kNoToken where the logits are not finite
  int32_t* input_ids = nullptr;          // [sequences]: the tokens for the next step, 0 for kNoToken; may be null
  int32_t* past_lengths = nullptr;       // [sequences]: 1 is added to each, for the next step; may be null
  void* workspace = nullptr;             // 16-byte aligned, of sampling_workspace_bytes; its contents do not matter
  int32_t* semaphores = nullptr;         // [sequences + 1]: zero before the first launch, and left zero
};

// Gives the size of the workspace for up to `max_sequences` sequences.
QWEN_PLUGINS_API cudaError_t sampling_workspace_bytes(int32_t max_sequences, int32_t vocab_size, int64_t* bytes);

// Launches on `stream` and returns at once: no synchronisation, no allocation. cudaErrorInvalidValue for parameters
// outside of what is written above.
QWEN_PLUGINS_API cudaError_t launch_sampling(const SamplingParams& params, cudaStream_t stream);

struct MarkSeenParams {
  const int32_t* tokens = nullptr;      // [cu_seqlens[sequences]], packed; those outside of the vocabulary are ignored
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1]: where each sequence's tokens begin, and their end
  int32_t sequences = 0;                // 0 launches nothing
  int32_t vocab_size = 0;
  uint32_t* seen = nullptr;  // as in SamplingParams
};

// Sets the tokens' bits: a prompt's tokens, before the first choice.
QWEN_PLUGINS_API cudaError_t launch_mark_seen(const MarkSeenParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
