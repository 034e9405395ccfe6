#include <limits>

#include "attention_heads.cuh"
#include "launch.h"
#include "prefill_attention.h"
#include "programmatic_launch.cuh"

namespace qwen_plugins {
namespace {

constexpr int kPrepareWarps = 8;
constexpr int kPlainWarps = 4;

// The sequence of a packed token: how many end at or before it. Each lane looks at one end at a time.
__device__ __forceinline__ int sequence_of(const int32_t* cu_seqlens, int sequences, int64_t token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0;; first += 32) {
    const int index = first + lane;
    const bool ended = index < sequences && cu_seqlens[index + 1] <= token;
    const unsigned votes = __ballot_sync(0xffffffffU, ended);
    if (votes != 0xffffffffU) return first + __popc(votes);
  }
}

__device__ __forceinline__ int past_length(const PrefillAttentionParams& p, int sequence) {
  return p.past_lengths == nullptr ? 0 : p.past_lengths[sequence];
}

// One block a token; each warp takes heads of q, k and v in turn.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(32 * kPrepareWarps) prepare_tokens(const __grid_constant__ PrefillAttentionParams p) {
  __shared__ float rows[kPrepareWarps][kHeadSize];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = blockIdx.x;
  const int sequence = sequence_of(p.cu_seqlens, p.sequences, token);
  const int position = past_length(p, sequence) + static_cast<int>(token) - p.cu_seqlens[sequence];
  const int row = rotary_offset(p.heads, sequence) + position;
  const float* const cos_sin = p.heads.rotary_table + row * int64_t{p.heads.rotary_dim};
  const float q_factor = query_factor(p.heads, row);
  const T* const qkv = static_cast<const T*>(p.qkv) + token * p.qkv_row_stride;
  T* const context = static_cast<T*>(p.context) + token * p.heads.num_heads * kHeadSize;
  T* const cache = static_cast<T*>(p.cache.data) + position * int64_t{kHeadSize};
  const int first_k = p.heads.num_heads;
  const int first_v = first_k + p.heads.num_kv_heads;

  for (int head = warp; head < first_v + p.heads.num_kv_heads; head += kPrepareWarps) {
    const T* const x = qkv + head * kHeadSize;
    if (head >= first_v) {
      T* const to = cache + cache_offset(p.heads, p.cache, sequence, 1, head - first_v);
      for (int d = lane; d < kHeadSize; d += 32) to[d] = x[d];
      continue;
    }
    const bool is_query = head < first_k;
    const auto* norm = static_cast<const T*>(is_query ? p.heads.q_norm_weight : p.heads.k_norm_weight);
    prepare_head<T, kHeadSize>(rows[warp], x, norm, p.heads, cos_sin, is_query ? q_factor : 1.0F);
    T* const to =
        is_query ? context + head * kHeadSize : cache + cache_offset(p.heads, p.cache, sequence, 0, head - first_k);
    for (int d = lane; d < kHeadSize; d += 32) to[d] = from_float<T>(rows[warp][d]);
    __syncwarp();
  }
}

// Attention without tensor cores, for float32: a warp for each token and head, one key after the other.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(32 * kPlainWarps) attend_plainly(const __grid_constant__ PrefillAttentionParams p) {
  constexpr int kPerLane = (kHeadSize + 31) / 32;
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y * kPlainWarps + threadIdx.x / 32);
  if (head >= p.heads.num_heads) return;
  const int64_t token = blockIdx.x;
  const int sequence = sequence_of(p.cu_seqlens, p.sequences, token);
  const int position = past_length(p, sequence) + static_cast<int>(token) - p.cu_seqlens[sequence];
  const int kv_head = head / (p.heads.num_heads / p.heads.num_kv_heads);
  const T* const cache = static_cast<const T*>(p.cache.data);
  const T* const keys = cache + cache_offset(p.heads, p.cache, sequence, 0, kv_head);
  const T* const values = cache + cache_offset(p.heads, p.cache, sequence, 1, kv_head);
  T* const context = static_cast<T*>(p.context) + (token * p.heads.num_heads + head) * kHeadSize;
  float q[kPerLane] = {};
  float result[kPerLane] = {};
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) q[i] = to_float(context[lane + 32 * i]) * p.softmax_scale;
  }
  float maximum = -INFINITY;
  float sum = 0.0F;
  for (int64_t key = 0; key <= position; ++key) {
    float score = 0.0F;
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i < kHeadSize) score += q[i] * to_float(keys[key * kHeadSize + lane + 32 * i]);
    }
    score = sum_over_warp(score);
    const float new_maximum = fmaxf(maximum, score);
    const float factor = expf(maximum - new_maximum);
    const float weight = expf(score - new_maximum);
    maximum = new_maximum;
    sum = sum * factor + weight;
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i >= kHeadSize) continue;
      result[i] = result[i] * factor + weight * to_float(values[key * kHeadSize + lane + 32 * i]);
    }
  }
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) context[lane + 32 * i] = from_float<T>(result[i] / sum);
  }
}

template <typename T, int kHeadSize>
cudaError_t launch(const PrefillAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  const dim3 tokens(static_cast<unsigned>(p.tokens));
  const cudaError_t error =
      launch_kernel(prepare_tokens<T, kHeadSize>, tokens, dim3(32 * kPrepareWarps), 0, device, stream, p);
  if (error != cudaSuccess) return error;
  const dim3 blocks(tokens.x, static_cast<unsigned>((p.heads.num_heads + kPlainWarps - 1) / kPlainWarps));
  return launch_kernel(attend_plainly<T, kHeadSize>, blocks, dim3(32 * kPlainWarps), 0, device, stream, p);
}

}  // namespace

cudaError_t launch_prefill_attention(const PrefillAttentionParams& p, cudaStream_t stream) {
  const int64_t columns = int64_t{p.heads.num_heads + 2 * p.heads.num_kv_heads} * p.heads.head_size;
  if (!is_valid(p.heads, p.cache) || p.qkv_row_stride < columns || p.tokens < 0 || p.sequences < 0 ||
      p.tokens > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  if (p.tokens == 0) return cudaSuccess;
  if (p.qkv == nullptr || p.context == nullptr || p.cu_seqlens == nullptr || p.sequences == 0 ||
      reinterpret_cast<uintptr_t>(p.context) % sizeof(FullPack) != 0) {
    return cudaErrorInvalidValue;
  }
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return with_type_and_head_size(
      p.heads, [&](auto type, auto head_size) { return launch<decltype(type), head_size.value>(p, device, stream); });
}

}  // namespace qwen_plugins
