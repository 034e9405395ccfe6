// What heads.h describes, in device code.
#pragma once

#include "heads.h"
#include "kernels/common/elements.cuh"

namespace qwen_plugins {

// The offset, in elements, of the keys (which = 0) or values (1) of a sequence and key-value head in the cache.
__device__ __forceinline__ int64_t cache_offset(const AttentionHeads& heads, const KvCache& cache, int64_t sequence,
                                                int which, int kv_head) {
  return ((sequence * 2 + which) * heads.num_kv_heads + kv_head) * cache.max_positions * heads.head_size;
}

// The neighbouring elements that one lane loads of a head, of q, k or v or of the cache.
constexpr int kVecSize = 8;
template <typename T>
struct Vector {
  FullPack packs[kVecSize / kVec<T>];
};

template <typename T>
__device__ __forceinline__ void to_floats(float (&out)[kVecSize], const Vector<T>& vector) {
#pragma unroll
  for (int i = 0; i < kVecSize / kVec<T>; ++i) {
    float part[kVec<T>];
    unpack<T>(part, vector.packs[i]);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) out[i * kVec<T> + j] = part[j];
  }
}
template <typename T>
__device__ __forceinline__ Vector<T> from_floats(const float (&values)[kVecSize]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVecSize / kVec<T>; ++i) {
    float part[kVec<T>];
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) part[j] = values[i * kVec<T> + j];
    vector.packs[i] = pack<T>(part);
  }
  return vector;
}

// Lanes that hold a head together, a power of two; those beyond the end of the head are idle.
template <int kHeadSize>
constexpr int kHeadLanes = kHeadSize <= 32    ? 4
                           : kHeadSize <= 64  ? 8
                           : kHeadSize <= 128 ? 16
                                              : 32;

constexpr float kLog2E = 1.44269504F;  // a factor of scores: the softmax is computed with exp2
// Smaller than any score, yet finite: the difference of two of them is 0 and not NaN.
constexpr float kLowestScore = -1e30F;

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffU, value, offset);
  return value;
}

// The two elements that the rotary embedding rotates together, in either style.
struct RotaryPair {
  int index;    // of the pair's cosine and sine
  int partner;  // the other element
  float sign;   // with which the other element times the sine is added

  __device__ __forceinline__ RotaryPair(RotaryStyle style, int element, int rotary_dim) {
    const int half = rotary_dim / 2;
    const bool neox = style == RotaryStyle::kNeox;
    const bool first = neox ? element < half : element % 2 == 0;
    const int distance = neox ? half : 1;
    partner = first ? element + distance : element - distance;
    index = neox ? min(element, partner) : element / 2;
    sign = first ? -1.0F : 1.0F;
  }
};

// One warp prepares one head of q or k for attention: normalises, rotates and scales it, and writes it to `out`
// [kHeadSize] in shared memory, as float32 values that T can represent. `norm_weight` may be null; `cos_sin` is the
// token's row of the rotary table. All loads are issued before the first of them is used.
template <typename T, int kHeadSize>
__device__ __forceinline__ void prepare_head(float* out, const T* x, const T* norm_weight, const AttentionHeads& heads,
                                             const float* cos_sin, float scale) {
  constexpr int kPerLane = (kHeadSize + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float values[kPerLane];
  float weights[kPerLane] = {};
  float cosines[kPerLane] = {};
  float sines[kPerLane] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    values[i] = d < kHeadSize ? to_float(x[d]) : 0.0F;
    if (norm_weight != nullptr && d < kHeadSize) weights[i] = to_float(norm_weight[d]);
    if (d < heads.rotary_dim) {
      const RotaryPair pair(heads.rotary_style, d, heads.rotary_dim);
      cosines[i] = cos_sin[pair.index];
      sines[i] = cos_sin[heads.rotary_dim / 2 + pair.index];
    }
  }
  if (norm_weight != nullptr) {
    float sum_of_squares = 0.0F;
#pragma unroll
    for (const float value : values) sum_of_squares += value * value;
    const float factor = rsqrtf(sum_over_warp(sum_of_squares) / kHeadSize + heads.norm_eps);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = to_float(from_float<T>(values[i] * factor * weights[i]));
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) out[lane + 32 * i] = values[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < heads.rotary_dim) {
      const RotaryPair pair(heads.rotary_style, d, heads.rotary_dim);
      values[i] = values[i] * cosines[i] + pair.sign * out[pair.partner] * sines[i];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) out[lane + 32 * i] = to_float(from_float<T>(values[i] * scale));
  }
  __syncwarp();
}

// The row of a sequence's first position in the rotary table.
__device__ __forceinline__ int rotary_offset(const AttentionHeads& heads, int sequence) {
  return heads.rotary_offsets == nullptr ? 0 : heads.rotary_offsets[sequence];
}
// The factor of q at a row of the rotary table.
__device__ __forceinline__ float query_factor(const AttentionHeads& heads, int row) {
  return heads.query_scale == nullptr ? 1.0F : heads.query_scale[row];
}

// The host's checks of what is written in heads.h.
inline bool is_valid(const AttentionHeads& heads, const KvCache& cache) {
  const bool sizes = heads.num_kv_heads > 0 && heads.num_heads > 0 && heads.num_heads <= kMaxHeads &&
                     heads.num_heads % heads.num_kv_heads == 0 && heads.rotary_dim >= 0 && heads.rotary_dim % 2 == 0 &&
                     heads.rotary_dim <= heads.head_size;
  const bool table = heads.rotary_dim == 0 || heads.rotary_table != nullptr;
  const bool style = heads.rotary_style == RotaryStyle::kNeox || heads.rotary_style == RotaryStyle::kGptJ;
  const bool norms = (heads.q_norm_weight == nullptr) == (heads.k_norm_weight == nullptr);
  return sizes && table && style && norms && cache.data != nullptr && cache.max_positions > 0 &&
         reinterpret_cast<uintptr_t>(cache.data) % sizeof(FullPack) == 0;
}

// Calls `launch(T{}, std::integral_constant<int, head_size>{})` for the element type and the head size of `heads`.
template <int kIndex = 0, typename Launch>
cudaError_t with_type_and_head_size(const AttentionHeads& heads, const Launch& launch) {
  if constexpr (kIndex == kHeadSizes.size()) {
    return cudaErrorInvalidValue;
  } else {
    if (heads.head_size != kHeadSizes[kIndex]) return with_type_and_head_size<kIndex + 1>(heads, launch);
    return with_type(heads.dtype,
                     [&](auto zero) { return launch(zero, std::integral_constant<int, kHeadSizes[kIndex]>{}); });
  }
}

}  // namespace qwen_plugins
