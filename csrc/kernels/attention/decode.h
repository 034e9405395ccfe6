// Attention of one new token a sequence over its key-value cache: what the host can launch.
//
// Everything between the qkv projection and the output projection of a decode step: q and k are normalised and rotated
// (heads.h), k and v written to the cache, and softmax(q · K^T * softmax_scale) · V is computed over the cache with
// them. A long sequence is split among blocks, and query heads that share a key-value head read the cache once; the
// last block of a sequence and key-value head combines the results (Dao et al., "Flash-Decoding", 2023), or the blocks
// of a cluster send them to each other. A short sequence is not split: one block for each query head is faster.
#pragma once

#include "heads.h"
#include "kernels/common/api.h"

namespace qwen_plugins {

// The limit of one launch's grid.
constexpr int32_t kMaxDecodeSequences = 65535;

struct DecodeAttentionParams {
  AttentionHeads heads;
  KvCache cache;
  const void* qkv = nullptr;              // [sequences, num_heads + 2 * num_kv_heads, head_size]
  int64_t qkv_row_stride = 0;             // elements
  void* context = nullptr;                // [sequences, num_heads, head_size], contiguous; codes 16-byte aligned
  const int32_t* past_lengths = nullptr;  // [sequences], on the device: the new tokens' positions, which the cache has
  int32_t sequences = 0;                  // at most kMaxDecodeSequences; 0 launches nothing
  float softmax_scale = 1.0F;             // above 0; usually 1 / sqrt(head_size)
  // 16-byte aligned, at least decode_attention_workspace_bytes; its contents do not matter. Launches that may overlap
  // need workspaces and semaphores of their own.
  void* workspace = nullptr;
  // [sequences, num_heads]: zero before the first launch, and every launch leaves them so.
  int32_t* semaphores = nullptr;
  // One float32 on the device, above 0: the context has codes of 8 bits, saturate(round(element * (1 / scale))) to
  // nearest even. Null: it is of the type of the heads.
  const float* context_scale = nullptr;
  DataType context_dtype = DataType::kInt8;  // kInt8 or kFloat8E4M3: of the codes
  // How a sequence is split depends on its own length alone: its result has the same bits in every company.
  bool batch_invariant = false;
};

// Gives the size of the workspace for that many sequences. It never decreases with their number: the workspace for the
// most sequences serves all. cudaErrorInvalidValue for numbers that launch_decode_attention refuses.
QWEN_PLUGINS_API cudaError_t decode_attention_workspace_bytes(const AttentionHeads& heads, int32_t sequences,
                                                              int64_t* bytes);

// Launches on `stream` and returns at once: no synchronisation, no allocation; the launch depends on no value in device
// memory, so that a CUDA graph of it serves sequences of any length. cudaErrorInvalidValue for parameters outside of
// what is written above and in heads.h, otherwise what the launch returned.
QWEN_PLUGINS_API cudaError_t launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
