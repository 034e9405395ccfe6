// What prefill and decode have in common: the packed projections, the key-value cache, and what happens to q and k
// before attention.
//
//   q, k = RMSNorm of each head       (only with norm weights: Qwen3)
//   q, k = rotary embedding           (kNeox: element i < rotary_dim / 2 is rotated with element i + rotary_dim / 2;
//                                      kGptJ: element 2i with element 2i + 1)
//   q    = q * query_scale            (only with query_scale: Qwen v1's logn)
//
// Computed in float32, and rounded to dtype after the first line and after the last. Su et al., "RoFormer" (2021).
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>

#include "kernels/common/data_type.h"

namespace qwen_plugins {

constexpr std::array<int32_t, 6> kHeadSizes{32, 64, 80, 96, 128, 256};

// The limit of num_heads: with it the grids of all launches stay within CUDA's limits.
constexpr int32_t kMaxHeads = 1 << 13;

// Values are part of the plug-ins' serialised form.
enum class RotaryStyle : int32_t { kNeox = 0, kGptJ = 1 };

struct AttentionHeads {
  int32_t num_heads = 0;                // at most kMaxHeads
  int32_t num_kv_heads = 0;             // divides num_heads
  int32_t head_size = 0;                // one of kHeadSizes
  int32_t rotary_dim = 0;               // even, at most head_size; 0: no rotary embedding
  DataType dtype = DataType::kFloat16;  // kFloat32, kFloat16 or kBFloat16: of qkv, cache, norm weights and result

  const float* rotary_table = nullptr;  // [rows, rotary_dim]: cosines, then sines
  // [sequences], on the device: a token at position p of sequence i uses row rotary_offsets[i] + p; null: row p
  const int32_t* rotary_offsets = nullptr;
  RotaryStyle rotary_style = RotaryStyle::kNeox;
  const float* query_scale = nullptr;   // [rows]; null: 1
  const void* q_norm_weight = nullptr;  // [head_size]; null: q and k are not normalised
  const void* k_norm_weight = nullptr;  // [head_size]
  float norm_eps = 1e-6F;
};

// Keys and values of one layer: [sequences, 2, num_kv_heads, max_positions, head_size], contiguous, 16-byte aligned.
struct KvCache {
  void* data = nullptr;
  int32_t max_positions = 0;
};

}  // namespace qwen_plugins
