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
  DataType dtype = DataType::kFloat16;  // kFloat32, kFloat16 or kBFloat16: of qkv, norm weights and result

  const float* rotary_table = nullptr;  // [rows, rotary_dim]: cosines, then sines
  // [sequences], on the device: a token at position p of sequence i uses row rotary_offsets[i] + p; null: row p
  const int32_t* rotary_offsets = nullptr;
  RotaryStyle rotary_style = RotaryStyle::kNeox;
  const float* query_scale = nullptr;   // [rows]; null: 1
  const void* q_norm_weight = nullptr;  // [head_size]; null: q and k are not normalised
  const void* k_norm_weight = nullptr;  // [head_size]
  float norm_eps = 1e-6F;
};

// Positions of a page. The tiles of all kernels divide it, so that no tile straddles two pages.
constexpr int32_t kPageSize = 64;

// Values are part of the plug-ins' serialised form.
enum class CacheDataType : int32_t {
  kSame = 0,  // that of the heads
  kInt8 = 1,
  kFloat8E4M3 = 2,
};

// Keys and values of one layer: rows of [2, num_kv_heads] blocks, which are [max_positions, head_size] elements each,
// all contiguous. In a block of an 8-bit type the elements are codes, and float32 scales [max_positions] follow: an
// element is code * scale. The scale of a token and head is its largest magnitude / 127 (int8) or / 448 (float8), 0
// where all elements are 0 and NaN where one of them is; codes are rounded to nearest even. Keys are cached after the
// rotary embedding, and every token, also a new one, is attended to as it is in the cache.
struct KvCache {
  void* data = nullptr;       // 16-byte aligned
  int32_t max_positions = 0;  // of a row: kPageSize with pages; a multiple of it with 8-bit types
  CacheDataType dtype = CacheDataType::kSame;
  // [sequences, pages_row_stride], on the device: the row that has positions i * kPageSize and on of a sequence. Null:
  // sequence i has row i. Sequences may share pages that no launch writes to. What is behind a sequence's last page is
  // not used, but must be the number of some row. No kernel that may still run at this launch may write the table.
  const int32_t* pages = nullptr;
  int32_t pages_row_stride = 0;
};

// Whether codes of a context can be of this type.
constexpr bool is_context_code(DataType type) { return type == DataType::kInt8 || type == DataType::kFloat8E4M3; }

// The most positions that a sequence can have.
constexpr int64_t max_sequence_positions(const KvCache& cache) {
  return cache.pages == nullptr ? cache.max_positions : int64_t{cache.pages_row_stride} * cache.max_positions;
}

}  // namespace qwen_plugins
