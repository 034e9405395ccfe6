// What makes few and short sequences fast, where all of the time is latency: keys and values are loaded before q is
// made ready; a short sequence is not split among blocks; and no phase is left to a few threads that others could help.
#include <algorithm>

#include "decode_attention.h"
#include "decode_attention_tiles.cuh"
#include "decode_attention_vectors.cuh"
#include "decode_attention_work.cuh"
#include "launch.h"
#include "programmatic_launch.cuh"

namespace qwen_plugins {
namespace {

using namespace decoding;

constexpr int kPrefetched = 128;  // positions

// The new key and value for this block, and to the cache if that is this block's task.
template <typename T, int kHeadSize>
__device__ __forceinline__ void prepare_new_token(const DecodeAttentionParams& p, const Work& work, const T* qkv,
                                                  const float* cos_sin, float* new_key, float* new_value) {
  const int key_row = p.heads.num_heads + work.kv_head;
  const T* const value = qkv + (key_row + p.heads.num_kv_heads) * kHeadSize;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int d = lane; d < kHeadSize; d += 32) new_value[d] = to_float(value[d]);
  prepare_head<T, kHeadSize>(new_key, qkv + key_row * kHeadSize, static_cast<const T*>(p.heads.k_norm_weight), p.heads,
                             cos_sin, 1.0F);
  if (!work.writes_new_token) return;
  T* const cache = static_cast<T*>(p.cache.data) + work.past_length * int64_t{kHeadSize};
  T* const key_place = cache + cache_offset(p.heads, p.cache, work.sequence, 0, work.kv_head);
  T* const value_place = cache + cache_offset(p.heads, p.cache, work.sequence, 1, work.kv_head);
#pragma unroll
  for (int d = lane; d < kHeadSize; d += 32) {
    key_place[d] = from_float<T>(new_key[d]);
    value_place[d] = from_float<T>(new_value[d]);
  }
}

// Makes q, and the new key and value if they belong to this block, ready in shared memory.
template <typename T, int kHeadSize, typename Attention>
__device__ __forceinline__ void prepare(const DecodeAttentionParams& p, const Work& work, int rotary_row,
                                        typename Attention::SharedMemory& shared) {
  const T* const qkv = static_cast<const T*>(p.qkv) + work.sequence * p.qkv_row_stride;
  const float* const cos_sin = p.heads.rotary_table + rotary_row * int64_t{p.heads.rotary_dim};
  const int warps = static_cast<int>(blockDim.x) / 32;
  Attention::clear_other_queries(shared, work.num_heads);
  for (int i = static_cast<int>(threadIdx.x) / 32; i < work.num_heads + 1; i += warps) {
    if (i < work.num_heads) {
      prepare_head<T, kHeadSize>(shared.queries[i], qkv + (work.first_head + i) * kHeadSize,
                                 static_cast<const T*>(p.heads.q_norm_weight), p.heads, cos_sin,
                                 query_factor(p.heads, rotary_row));
      Attention::keep_query(shared, i);
    } else if (i == work.num_heads && work.has_new_token) {
      prepare_new_token<T, kHeadSize>(p, work, qkv, cos_sin, shared.new_key, shared.new_value);
    }
  }
}

// Combines `count` partial results of one head, at most kMost: each lane has one's maximum and sum, and `read(i)` is
// the lane's element of the i-th one's values. Returns that element of the sum; `total` has its maximum and sum. All is
// read before it is used: what is read may be far.
template <int kMost, typename Read>
__device__ __forceinline__ float combine(int count, const Partial& of_lane, const Read& read, Partial& total) {
  float values[kMost];
#pragma unroll
  for (int i = 0; i < kMost; ++i) values[i] = i < count ? read(i) : 0.0F;
  total.maximum = of_lane.maximum;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total.maximum = fmaxf(total.maximum, __shfl_xor_sync(0xffffffffU, total.maximum, offset));
  }
  const float factor = exp2_approximately(of_lane.maximum - total.maximum);
  total.sum = sum_over_warp(factor * of_lane.sum);
  float result = 0.0F;
#pragma unroll
  for (int i = 0; i < kMost; ++i) result += __shfl_sync(0xffffffffU, factor, i) * values[i];
  return result;
}

// Workspace: for each sequence, head and split its maximum and sum, then its values [head_size].
struct Workspace {
  float2* partials;
  float* values;
};

__device__ __forceinline__ Workspace workspace_of(const DecodeAttentionParams& p) {
  Workspace workspace;
  workspace.partials = static_cast<float2*>(p.workspace);
  workspace.values =
      reinterpret_cast<float*>(workspace.partials + int64_t{p.sequences} * p.heads.num_heads * gridDim.x);
  return workspace;
}

// True in the one block that finds the results of all splits of its heads written.
__device__ __forceinline__ bool is_last_block(int* counter, int num_splits, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == num_splits - 1;
    if (last) *counter = 0;  // for the next launch
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Calls `function(head, element)`, in whole warps, for all elements of the heads of a block and those that fill up the
// last warp of a head.
template <int kHeadSize, typename Function>
__device__ __forceinline__ void for_elements(int num_heads, const Function& function) {
  constexpr unsigned kParts = (kHeadSize + 31) / 32;
  const unsigned warps = blockDim.x / 32;
  for (unsigned i = threadIdx.x / 32; i < num_heads * kParts; i += warps) {
    function(static_cast<int>(i / kParts), static_cast<int>(i % kParts * 32 + threadIdx.x % 32));
  }
}

template <typename T, int kHeadSize>
__device__ __forceinline__ void combine_splits(const DecodeAttentionParams& p, const Work& work,
                                               const Workspace& workspace, int64_t first_head) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_elements<kHeadSize>(work.num_heads, [&](int h, int d) {
    const int64_t place = (first_head + h) * gridDim.x;
    const int readable = min(d, kHeadSize - 1);
    Partial partial;
    if (lane < work.num_splits) partial = Partial(__ldcg(workspace.partials + place + lane));
    const auto read = [&](int split) { return __ldcg(workspace.values + (place + split) * kHeadSize + readable); };
    Partial total;
    const float value = combine<kMaxSplits>(work.num_splits, partial, read, total);
    if (d < kHeadSize) {
      static_cast<T*>(p.context)[(first_head + h) * kHeadSize + d] = from_float<T>(__fdividef(value, total.sum));
    }
  });
}

template <typename T, int kHeadSize, typename Attention>
__device__ __forceinline__ void attend_block(const DecodeAttentionParams& p, const Work& work, int rotary_row,
                                             typename Attention::SharedMemory& shared) {
  Attention attention(p, work);
  prepare<T, kHeadSize, Attention>(p, work, rotary_row, shared);
  __syncthreads();
  attention.attend(work, p.softmax_scale * 1.44269504F, shared);  // log2(e), for exp2
  attention.write(shared);
  __syncthreads();

  const Workspace workspace = workspace_of(p);
  const int64_t first_head = int64_t{work.sequence} * p.heads.num_heads + work.first_head;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for_elements<kHeadSize>(work.num_heads, [&](int h, int d) {
    const auto place = [&](int warp) { return warp * Attention::kHeads + h; };
    const int readable = min(d, kHeadSize - 1);
    Partial partial;
    if (lane < warps) partial = Partial(shared.partials[place(lane)]);
    Partial total;
    const float value = combine<Attention::kWarps>(
        warps, partial, [&](int warp) { return shared.values[place(warp)][readable]; }, total);
    if (d >= kHeadSize) return;
    if (work.num_splits == 1) {
      static_cast<T*>(p.context)[(first_head + h) * kHeadSize + d] = from_float<T>(__fdividef(value, total.sum));
      return;
    }
    const int64_t split = (first_head + h) * gridDim.x + blockIdx.x;
    workspace.values[split * kHeadSize + d] = value;
    if (d == 0) workspace.partials[split] = make_float2(total.maximum, total.sum);
  });
  if (work.num_splits == 1) return;
  if (!is_last_block(p.semaphores + first_head, work.num_splits, shared.is_last_block)) return;
  combine_splits<T, kHeadSize>(p, work, workspace, first_head);
}

// Has this block's first keys and values on their way to the L2 cache while the kernel before may still run. It is a
// hint alone, for which nothing need be right: not the length either, which that kernel may yet change.
template <typename T, int kHeadSize>
__device__ __forceinline__ void prefetch_cache(const Arguments& a) {
  if (threadIdx.x >= 2) return;  // keys and values
  const DecodeAttentionParams& p = a.params;
  if (!a.prefetches) return;
  Work work;
  work.past_length = *static_cast<const volatile int32_t*>(p.past_lengths + blockIdx.z);
  work.past_length = max(0, min(work.past_length, p.cache.max_positions - 1));
  if (!find_work(a, work)) return;
  const T* const rows = static_cast<const T*>(p.cache.data) +
                        cache_offset(p.heads, p.cache, work.sequence, static_cast<int>(threadIdx.x), work.kv_head);
  prefetch_rows<T, kHeadSize>(rows, work.begin, min(work.end, work.begin + kPrefetched));
}

// The shared memory of a block with several query heads has room for that of one with a single head.
template <typename T, int kHeadSize, typename Attention>
__global__ void __launch_bounds__(32 * Attention::kWarps, 1) decode_attention(const __grid_constant__ Arguments a) {
  using Single = VectorAttention<T, kHeadSize>;
  extern __shared__ __align__(16) char shared[];
  trigger_dependent_launch();
  prefetch_cache<T, kHeadSize>(a);
  wait_for_previous_kernel();
  const int offset = rotary_offset(a.params.heads, static_cast<int>(blockIdx.z));
  Work work;
  work.past_length = a.params.past_lengths[blockIdx.z];
  if (!find_work(a, work)) return;
  const int rotary_row = offset + work.past_length;
  if (Attention::kHeads == 1 || work.num_heads == 1) {
    auto& memory = *reinterpret_cast<typename Single::SharedMemory*>(shared);
    attend_block<T, kHeadSize, Single>(a.params, work, rotary_row, memory);
  } else {
    auto& memory = *reinterpret_cast<typename Attention::SharedMemory*>(shared);
    attend_block<T, kHeadSize, Attention>(a.params, work, rotary_row, memory);
  }
}

// Large blocks, one a multiprocessor, if that is enough for every query head; otherwise two small ones. As many splits
// as that makes, if the cache may be long enough for them.
template <typename T, int kHeadSize, typename Attention>
cudaError_t launch_blocks(const DecodeAttentionParams& p, int whole_length, const DeviceProperties& device,
                          cudaStream_t stream) {
  using SharedMemory = typename Attention::SharedMemory;
  const int heads_per_kv_head = p.heads.num_heads / p.heads.num_kv_heads;
  const int chunks = (heads_per_kv_head + Attention::kHeads - 1) / Attention::kHeads;
  const int64_t blocks = int64_t{p.heads.num_kv_heads} * chunks * p.sequences;
  const bool large = int64_t{p.heads.num_heads} * p.sequences <= device.multiprocessors;
  const Arguments arguments{p, heads_per_kv_head, Attention::kHeads, chunks, whole_length, large};
  const int wanted = static_cast<int>((large ? 1 : 2) * device.multiprocessors / blocks);
  const int useful =
      std::max(std::min(heads_per_kv_head, Attention::kHeads), (p.cache.max_positions + kMinSplit - 1) / kMinSplit);
  const int splits = std::max(1, std::min({wanted, useful, kMaxSplits}));
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(p.heads.num_kv_heads * chunks),
                  static_cast<unsigned>(p.sequences));
  const dim3 threads(32U * (large ? Attention::kWarps : Attention::kWarps / 2));
  auto* const kernel = decode_attention<T, kHeadSize, Attention>;
  constexpr int kSharedBytes = static_cast<int>(sizeof(SharedMemory));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, grid, threads, kSharedBytes, device, stream, arguments);
}

template <typename T, int kHeadSize>
cudaError_t launch(const DecodeAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (p.heads.num_heads > p.heads.num_kv_heads) {
      return launch_blocks<T, kHeadSize, TileAttention<T, kHeadSize>>(p, 1024, device, stream);
    }
  }
  return launch_blocks<T, kHeadSize, VectorAttention<T, kHeadSize>>(p, 512, device, stream);
}

}  // namespace

cudaError_t decode_attention_workspace_bytes(const AttentionHeads& heads, int32_t sequences, int64_t* bytes) {
  if (heads.num_heads <= 0 || heads.head_size <= 0 || sequences < 0) return cudaErrorInvalidValue;
  const int64_t rows = int64_t{sequences} * heads.num_heads;
  *bytes = rows * kMaxSplits * (heads.head_size + 2) * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

cudaError_t launch_decode_attention(const DecodeAttentionParams& p, cudaStream_t stream) {
  const int64_t columns = int64_t{p.heads.num_heads + 2 * p.heads.num_kv_heads} * p.heads.head_size;
  if (!is_valid(p.heads, p.cache) || (p.qkv_row_stride < columns && p.sequences > 1) || p.sequences < 0 ||
      p.sequences > 65535) {
    return cudaErrorInvalidValue;
  }
  if (p.sequences == 0) return cudaSuccess;
  if (p.qkv == nullptr || p.context == nullptr || p.past_lengths == nullptr || p.workspace == nullptr ||
      p.semaphores == nullptr || reinterpret_cast<uintptr_t>(p.workspace) % sizeof(FullPack) != 0) {
    return cudaErrorInvalidValue;
  }
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return with_type_and_head_size(
      p.heads, [&](auto type, auto head_size) { return launch<decltype(type), head_size.value>(p, device, stream); });
}

}  // namespace qwen_plugins
