// Choosing the next token of each sequence from its logits, and log-probabilities: what the host can launch.
//
// The state of a sequence is in a slot of device memory: its settings, how many tokens were drawn, and how often it has
// which token. One launch chooses for rows of any slots. In this order: biases, repetition penalty, frequency and
// presence penalty, the mask of allowed tokens, temperature, the k most likely tokens, of those the most likely ones
// that together have probability top_p (the one that reaches it included), of those the ones with at least min_p times
// the probability of the likeliest, a draw. That is the order of transformers, and of vLLM for what transformers lacks.
//
// A draw depends on the logits, the settings, the draw stream and the number of tokens drawn before alone, whatever
// else is in the batch and in whichever row. Of equal logits at a limit those of the lower tokens stay. Logits may be
// -infinity; a row that has NaN or +infinity, or nothing but -infinity after all of this, gives kNoToken.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

constexpr int32_t kMaxVocabSize = 1 << 19;
constexpr int32_t kMaxBiases = 512;  // of a sequence
constexpr int32_t kMaxBest = 128;
constexpr int32_t kNoToken = -1;

// The settings of a sequence. They are in device memory, so that one CUDA graph serves every request. The layout is
// written once more in python/qwen_plugins/sampling_starts.py.
struct SamplingSettings {
  float temperature = 1.0F;  // above 0
  float top_p = 1.0F;        // above 0, at most 1
  float min_p = 0.0F;        // 0 to 1; 0: all
  float repetition_penalty = 1.0F;
  float presence_penalty = 0.0F;
  float frequency_penalty = 0.0F;
  int32_t top_k = 0;   // 0: all
  int32_t greedy = 0;  // not 0: the largest logit after biases, penalties and mask
  uint64_t seed = 0;
  uint64_t step = 0;           // tokens drawn before; every launch that reads the settings adds 1
  uint32_t draw_stream = 0;    // sequences with one seed draw differently from different streams
  int32_t num_biases = 0;      // at most kMaxBiases
  uint16_t* counts = nullptr;  // [(vocab_size + 31) / 32 * 32]: 2^15 for a token of the prompt, and how often the
                               // output has it; 4-byte aligned. Null: no penalties
};
static_assert(sizeof(SamplingSettings) == 64);

struct SamplingBias {
  int32_t token;
  float value;
};

// What is kept of all slots, in device memory.
struct SamplingSlots {
  SamplingSettings* settings = nullptr;  // [slots]
  SamplingBias* biases = nullptr;        // [slots, kMaxBiases]: of each slot, in the order of the tokens
  uint32_t* marks = nullptr;             // [slots, (vocab_size + 31) / 32]: bits of the tokens with a count or a bias
};

struct SamplingParams {
  const void* logits = nullptr;         // [sequences, vocab_size], dtype
  int64_t logits_row_stride = 0;        // elements
  int32_t sequences = 0;                // 0 launches nothing
  int32_t vocab_size = 0;               // at most kMaxVocabSize
  DataType dtype = DataType::kFloat16;  // kFloat32, kFloat16 or kBFloat16
  const int32_t* slots = nullptr;       // [sequences]: each row's; rows may only share one that takes the largest
                                        // logit. Null: row i has slot i
  bool largest = false;                 // the largest logit of every row, the first of equal ones: `state`, `mask_rows`
                                        // and `masks` are not used
  SamplingSlots state;
  const int32_t* mask_rows = nullptr;  // [slots]: the row of `masks` that holds for a slot, -1: all tokens are allowed
  const uint32_t* masks = nullptr;     // [masks, (vocab_size + 31) / 32]: bits of the tokens that may be chosen
  int32_t* tokens = nullptr;           // [sequences]: the result
  int32_t* last_tokens = nullptr;      // [slots]: the same by slot, 0 for kNoToken, for the next step; may be null
  int32_t* past_lengths = nullptr;     // [sequences]: 1 is added to each, for the next step; may be null
  void* workspace = nullptr;           // 16-byte aligned, of sampling_workspace_bytes; its contents do not matter
  int32_t* semaphores = nullptr;       // [sequences]: zero before the first launch, and left zero
};

// Gives the size of the workspace for up to `max_sequences` sequences.
QWEN_PLUGINS_API cudaError_t sampling_workspace_bytes(int32_t max_sequences, int32_t vocab_size, int64_t* bytes);

// Launches on `stream` and returns at once: no synchronisation, no allocation. cudaErrorInvalidValue for parameters
// outside of what is written above. Slots are not checked.
QWEN_PLUGINS_API cudaError_t launch_sampling(const SamplingParams& params, cudaStream_t stream);

// A sequence that begins in a slot, or comes back to one.
struct SamplingStart {
  SamplingSettings settings;
  int32_t slot = 0;
  int32_t first_bias = 0;     // in StartSamplingParams::biases, of settings.num_biases
  int32_t first_token = 0;    // in StartSamplingParams::tokens: those of the prompt, then those of the output
  int32_t prompt_length = 0;  // 0 without penalties
  int32_t output_length = 0;
  int32_t reserved = 0;
};
static_assert(sizeof(SamplingStart) == 88);

struct StartSamplingParams {
  const SamplingStart* starts = nullptr;  // [sequences], on the device; of different slots
  const SamplingBias* biases = nullptr;   // of all starts; null where none has any
  const int32_t* tokens = nullptr;        // likewise; those outside of the vocabulary are ignored
  int32_t sequences = 0;                  // 0 launches nothing
  int32_t vocab_size = 0;                 // at most kMaxVocabSize
  SamplingSlots state;
};

// Sets the state of slots: settings, biases, and the counts of tokens where there are penalties.
QWEN_PLUGINS_API cudaError_t launch_start_sampling(const StartSamplingParams& params, cudaStream_t stream);

struct LogprobsParams {
  const void* logits = nullptr;   // [sequences, vocab_size], dtype
  int64_t logits_row_stride = 0;  // elements
  int32_t sequences = 0;          // 0 launches nothing
  int32_t vocab_size = 0;         // at most kMaxVocabSize
  DataType dtype = DataType::kFloat16;
  int32_t num_best = 0;             // at most kMaxBest
  const int32_t* tokens = nullptr;  // [sequences]
  float* logprobs = nullptr;        // [sequences]: of `tokens`; NaN for kNoToken
  int32_t* best_tokens = nullptr;   // [sequences, num_best]: the most likely, best first, of equal ones the lowest
                                    // first; kNoToken beyond the vocabulary
  float* best_logprobs = nullptr;   // [sequences, num_best]: theirs; -infinity beyond the vocabulary
};

// Computes log-probabilities of the softmax of the logits as they are. They do not depend on the number of sequences. A
// row that has NaN or +infinity, or nothing but -infinity, gives NaN and kNoToken.
QWEN_PLUGINS_API cudaError_t launch_logprobs(const LogprobsParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
