#include <limits>

#include "attention_heads.cuh"
#include "launch.h"
#include "programmatic_launch.cuh"
#include "rotary_cache.h"

namespace qwen_plugins {
namespace {

constexpr int kWarps = 8;

// One block a token; each warp takes heads of q, k and v in turn.
template <typename T, int kHeadSize>
__global__ void __launch_bounds__(32 * kWarps) rotary_cache(const __grid_constant__ RotaryCacheParams p) {
  __shared__ float rows[kWarps][kHeadSize];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = blockIdx.x;
  const int64_t sequence = p.sequences[token];
  const int64_t position = p.positions[token];
  const float* cos_sin = rotary_row(p.heads, token);
  const float q_factor = query_factor(p.heads, token);
  T* const qkv = static_cast<T*>(p.qkv) + token * p.qkv_row_stride;
  T* const cache = static_cast<T*>(p.cache.data);
  const int first_k = p.heads.num_heads;
  const int first_v = first_k + p.heads.num_kv_heads;
  const int num_rows = first_v + p.heads.num_kv_heads;

  for (int head = warp; head < num_rows; head += kWarps) {
    T* const x = qkv + head * kHeadSize;
    if (head >= first_v) {
      T* const to = cache + cache_offset(p.heads, p.cache, sequence, 1, head - first_v) + position * kHeadSize;
      for (int d = lane; d < kHeadSize; d += 32) to[d] = x[d];
      continue;
    }
    const bool is_query = head < first_k;
    const auto* norm = static_cast<const T*>(is_query ? p.heads.q_norm_weight : p.heads.k_norm_weight);
    prepare_head<T, kHeadSize>(rows[warp], x, norm, p.heads.norm_eps, cos_sin, p.heads.rotary_dim,
                               is_query ? q_factor : 1.0F);
    T* const to =
        is_query ? nullptr : cache + cache_offset(p.heads, p.cache, sequence, 0, head - first_k) + position * kHeadSize;
    for (int d = lane; d < kHeadSize; d += 32) {
      const T value = from_float<T>(rows[warp][d]);
      x[d] = value;
      if (!is_query) to[d] = value;
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t launch_rotary_cache(const RotaryCacheParams& p, cudaStream_t stream) {
  const int64_t columns = int64_t{p.heads.num_heads + 2 * p.heads.num_kv_heads} * p.heads.head_size;
  if (!is_valid(p.heads, p.cache) || p.qkv_row_stride < columns || p.tokens < 0 ||
      p.tokens > std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  if (p.tokens == 0) return cudaSuccess;
  if (p.qkv == nullptr || p.sequences == nullptr || p.positions == nullptr) return cudaErrorInvalidValue;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return with_type_and_head_size(p.heads, [&](auto type, auto head_size) {
    return launch_kernel(rotary_cache<decltype(type), head_size.value>, dim3(static_cast<unsigned>(p.tokens)),
                         dim3(32 * kWarps), 0, device, stream, p);
  });
}

}  // namespace qwen_plugins
