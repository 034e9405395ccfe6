#include <algorithm>

#include "attention_heads.cuh"
#include "decode_attention.h"
#include "launch.h"
#include "programmatic_launch.cuh"

namespace qwen_plugins {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kVecSize = 8;      // elements of a key or value that one lane holds
constexpr int kMinSplit = 64;    // positions: below it another block costs more than it brings
constexpr int kMaxSplits = 32;   // what the last block has to combine
constexpr int kBlocksPerSm = 3;  // that registers leave room for: all blocks of one sequence run at once
// Smaller than any score, yet finite: the difference of two of them is 0 and not NaN.
constexpr float kLowest = -1e30F;

__host__ __device__ constexpr int round_up_to_power_of_two(int value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

// Online softmax of one query head in one lane: weights are 2^(score - maximum).
struct SoftmaxState {
  float maximum = kLowest;
  float sum = 0.0F;
  float values[kVecSize] = {};

  __device__ __forceinline__ void rescale(float new_maximum) {
    const float factor = exp2f(maximum - new_maximum);
    maximum = new_maximum;
    sum *= factor;
#pragma unroll
    for (float& value : values) value *= factor;
  }
};

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

// What one block works on.
struct Work {
  int sequence;
  int kv_head;
  int first_head;  // of the query heads
  int num_heads;   // at most kHeads
  int begin;       // positions of the cache
  int end;
  int num_splits;  // that have positions
  bool has_new_token;
};

// The grid is for the longest sequences; a short one is split less, and the blocks that it does not need leave.
template <int kHeads>
__device__ __forceinline__ bool find_work(const DecodeAttentionParams& p, Work& work) {
  const int heads_per_kv_head = p.heads.num_heads / p.heads.num_kv_heads;
  const int chunks = (heads_per_kv_head + kHeads - 1) / kHeads;
  work.sequence = static_cast<int>(blockIdx.z);
  work.kv_head = static_cast<int>(blockIdx.y) / chunks;
  const int first = static_cast<int>(blockIdx.y) % chunks * kHeads;
  work.first_head = work.kv_head * heads_per_kv_head + first;
  work.num_heads = min(kHeads, heads_per_kv_head - first);

  const int length = p.past_lengths[work.sequence] + 1;
  const int max_splits = static_cast<int>(gridDim.x);
  const int split_size = max(kMinSplit, (length + max_splits - 1) / max_splits);
  const int split = static_cast<int>(blockIdx.x);
  work.begin = split * split_size;
  work.end = min(work.begin + split_size, length);
  work.num_splits = (length + split_size - 1) / split_size;
  work.has_new_token = split == work.num_splits - 1;
  return split < work.num_splits;
}

// Makes q ready in `queries`, and writes the new key and value to the cache if they belong to this block.
template <typename T, int kHeadSize, int kHeads>
__device__ __forceinline__ void prepare(const DecodeAttentionParams& p, const Work& work,
                                        float (&queries)[kHeads + 1][kHeadSize]) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const T* const qkv = static_cast<const T*>(p.qkv) + work.sequence * p.qkv_row_stride;
  const float* const cos_sin = rotary_row(p.heads, work.sequence);
  const float q_factor = query_factor(p.heads, work.sequence);
  const int key_row = p.heads.num_heads + work.kv_head;
  for (int i = warp; i < work.num_heads; i += kWarps) {
    prepare_head<T, kHeadSize>(queries[i], qkv + (work.first_head + i) * kHeadSize,
                               static_cast<const T*>(p.heads.q_norm_weight), p.heads.norm_eps, cos_sin,
                               p.heads.rotary_dim, q_factor);
  }
  if (work.has_new_token && warp == kWarps - 1) {
    prepare_head<T, kHeadSize>(queries[kHeads], qkv + key_row * kHeadSize, static_cast<const T*>(p.heads.k_norm_weight),
                               p.heads.norm_eps, cos_sin, p.heads.rotary_dim, 1.0F);
    const int64_t place = (work.end - 1) * int64_t{kHeadSize};
    T* const cache = static_cast<T*>(p.cache.data);
    T* const key = cache + cache_offset(p.heads, p.cache, work.sequence, 0, work.kv_head) + place;
    T* const value = cache + cache_offset(p.heads, p.cache, work.sequence, 1, work.kv_head) + place;
    const T* const new_value = qkv + (key_row + p.heads.num_kv_heads) * kHeadSize;
    for (int d = static_cast<int>(threadIdx.x) % 32; d < kHeadSize; d += 32) {
      key[d] = from_float<T>(queries[kHeads][d]);
      value[d] = new_value[d];
    }
  }
  __syncthreads();
}

// Each group of kLanes lanes takes its own positions, each lane kVecSize elements of them.
template <typename T, int kHeadSize, int kHeads>
__device__ __forceinline__ void attend(const DecodeAttentionParams& p, const Work& work,
                                       const float (&queries)[kHeads + 1][kHeadSize], SoftmaxState (&states)[kHeads]) {
  constexpr int kLanes = round_up_to_power_of_two(kHeadSize / kVecSize);
  constexpr int kGroups = 32 / kLanes;
  constexpr int kUnroll = kHeads > 2 ? 2 : 4;  // positions of a group in flight; registers are what limits it
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int group = static_cast<int>(threadIdx.x) % 32 / kLanes;
  const int element = static_cast<int>(threadIdx.x) % kLanes * kVecSize;
  const bool in_head = element < kHeadSize;

  float q[kHeads][kVecSize];
  const float scale = p.softmax_scale * 1.44269504F;  // log2(e), for exp2
#pragma unroll
  for (int h = 0; h < kHeads; ++h)
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) q[h][j] = in_head && h < work.num_heads ? queries[h][element + j] * scale : 0.0F;

  const T* const cache = static_cast<const T*>(p.cache.data) + element;
  const T* const keys = cache + cache_offset(p.heads, p.cache, work.sequence, 0, work.kv_head);
  const T* const values = cache + cache_offset(p.heads, p.cache, work.sequence, 1, work.kv_head);
  constexpr int kStep = kGroups * kUnroll;  // positions that a warp takes at a time
  for (int start = work.begin + warp * kStep; start < work.end; start += kWarps * kStep) {
    Vector<T> key_vectors[kUnroll] = {};
    Vector<T> value_vectors[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int position = start + u * kGroups + group;
      if (in_head && position < work.end) {
        key_vectors[u] = *reinterpret_cast<const Vector<T>*>(keys + position * int64_t{kHeadSize});
        value_vectors[u] = *reinterpret_cast<const Vector<T>*>(values + position * int64_t{kHeadSize});
      }
    }
    float scores[kHeads][kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float key[kVecSize];
      to_floats<T>(key, key_vectors[u]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0.0F;
#pragma unroll
        for (int j = 0; j < kVecSize; ++j) score += q[h][j] * key[j];
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffU, score, offset);
        scores[h][u] = start + u * kGroups + group < work.end ? score : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float maximum = states[h].maximum;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) maximum = fmaxf(maximum, scores[h][u]);
      states[h].rescale(maximum);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        scores[h][u] = exp2f(scores[h][u] - maximum);
        states[h].sum += scores[h][u];
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float value[kVecSize];
      to_floats<T>(value, value_vectors[u]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h)
#pragma unroll
        for (int j = 0; j < kVecSize; ++j) states[h].values[j] += scores[h][u] * value[j];
    }
  }
  // The groups of a warp become one.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      states[h].rescale(fmaxf(states[h].maximum, __shfl_xor_sync(0xffffffffU, states[h].maximum, offset)));
      states[h].sum += __shfl_xor_sync(0xffffffffU, states[h].sum, offset);
#pragma unroll
      for (float& value : states[h].values) value += __shfl_xor_sync(0xffffffffU, value, offset);
    }
  }
}

struct Partial {
  float maximum;
  float sum;
};

// Sum of `count` partial results of one head, of which `read(i)` gives the i-th's value: the combined value, and its
// maximum and sum.
template <typename ReadPartial, typename ReadValue>
__device__ __forceinline__ float combine(int count, const ReadPartial& read_partial, const ReadValue& read_value,
                                         Partial& total) {
  total = {kLowest, 0.0F};
  for (int i = 0; i < count; ++i) total.maximum = fmaxf(total.maximum, read_partial(i).maximum);
  float result = 0.0F;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const Partial partial = read_partial(i);
    const float factor = exp2f(partial.maximum - total.maximum);
    total.sum += factor * partial.sum;
    result += factor * read_value(i);
  }
  return result;
}

// Workspace: counters [sequences, num_heads] (as many as there can be groups of heads), then for each sequence, head
// and split its maximum and sum, then its values [head_size].
struct Workspace {
  int* counters;
  float2* partials;
  float* values;
};

__host__ __device__ constexpr int64_t counter_bytes(int64_t heads) { return (heads * 4 + 15) / 16 * 16; }

__device__ __forceinline__ Workspace workspace_of(const DecodeAttentionParams& p) {
  const int64_t heads = int64_t{p.workspace_sequences} * p.heads.num_heads;
  char* const base = static_cast<char*>(p.workspace);
  Workspace workspace;
  workspace.counters = reinterpret_cast<int*>(base);
  workspace.partials = reinterpret_cast<float2*>(base + counter_bytes(heads));
  workspace.values = reinterpret_cast<float*>(workspace.partials + heads * gridDim.x);
  return workspace;
}

// True in the one block that finds the results of all splits of its heads written.
__device__ __forceinline__ bool is_last_block(int* counter, int num_splits) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1) == num_splits - 1;
    if (last) *counter = 0;  // for the next launch
  }
  __syncthreads();
  __threadfence();
  return last;
}

template <typename T, int kHeadSize, int kHeads>
__global__ void __launch_bounds__(kThreads) decode_attention(const __grid_constant__ DecodeAttentionParams p) {
  __shared__ float queries[kHeads + 1][kHeadSize];
  __shared__ Partial warp_partials[kWarps][kHeads];
  __shared__ float warp_values[kWarps][kHeads][kHeadSize];

  trigger_dependent_launch();
  wait_for_previous_kernel();
  Work work;
  if (!find_work<kHeads>(p, work)) return;
  prepare<T, kHeadSize, kHeads>(p, work, queries);
  SoftmaxState states[kHeads];
  attend<T, kHeadSize, kHeads>(p, work, queries, states);

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (lane == 0) warp_partials[warp][h] = {states[h].maximum, states[h].sum};
    if (lane * kVecSize < kHeadSize) {
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) warp_values[warp][h][lane * kVecSize + j] = states[h].values[j];
    }
  }
  __syncthreads();

  const Workspace workspace = workspace_of(p);
  T* const context = static_cast<T*>(p.context);
  const int64_t first_head = int64_t{work.sequence} * p.heads.num_heads + work.first_head;
  for (int i = static_cast<int>(threadIdx.x); i < work.num_heads * kHeadSize; i += kThreads) {
    const int h = i / kHeadSize;
    const int d = i % kHeadSize;
    Partial total;
    const float value =
        combine(kWarps, [&](int w) { return warp_partials[w][h]; }, [&](int w) { return warp_values[w][h][d]; }, total);
    if (work.num_splits == 1) {
      context[(first_head + h) * kHeadSize + d] = from_float<T>(value / total.sum);
      continue;
    }
    const int64_t place = (first_head + h) * gridDim.x + blockIdx.x;
    workspace.values[place * kHeadSize + d] = value;
    if (d == 0) workspace.partials[place] = make_float2(total.maximum, total.sum);
  }
  if (work.num_splits == 1 || !is_last_block(workspace.counters + first_head, work.num_splits)) return;

  for (int i = static_cast<int>(threadIdx.x); i < work.num_heads * kHeadSize; i += kThreads) {
    const int64_t head = first_head + i / kHeadSize;
    const int d = i % kHeadSize;
    const auto read_partial = [&](int split) {
      const float2 partial = __ldcg(workspace.partials + head * gridDim.x + split);
      return Partial{partial.x, partial.y};
    };
    const auto read_value = [&](int split) {
      return __ldcg(workspace.values + (head * gridDim.x + split) * kHeadSize + d);
    };
    Partial total;
    const float value = combine(work.num_splits, read_partial, read_value, total);
    context[head * kHeadSize + d] = from_float<T>(value / total.sum);
  }
}

// Query heads that a block takes: all that share a key-value head, up to what registers and shared memory hold.
int heads_per_block(const AttentionHeads& heads) {
  const int shared = heads.num_heads / heads.num_kv_heads;
  const int most = heads.head_size > 128 || heads.dtype == DataType::kFloat32 ? 4 : 8;
  return std::min(round_up_to_power_of_two(shared), most);
}

dim3 grid_of(const DecodeAttentionParams& p, int multiprocessors) {
  const int per_block = heads_per_block(p.heads);
  const int shared = p.heads.num_heads / p.heads.num_kv_heads;
  const int blocks_y = p.heads.num_kv_heads * ((shared + per_block - 1) / per_block);
  const int wanted = kBlocksPerSm * multiprocessors / (blocks_y * p.sequences);
  const int useful = (p.cache.max_positions + kMinSplit - 1) / kMinSplit;
  const int splits = std::max(1, std::min({wanted, useful, kMaxSplits}));
  return {static_cast<unsigned>(splits), static_cast<unsigned>(blocks_y), static_cast<unsigned>(p.sequences)};
}

template <typename T, int kHeadSize>
cudaError_t launch(const DecodeAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  auto* kernel = decode_attention<T, kHeadSize, 1>;
  switch (heads_per_block(p.heads)) {
    case 1:
      break;
    case 2:
      kernel = decode_attention<T, kHeadSize, 2>;
      break;
    case 4:
      kernel = decode_attention<T, kHeadSize, 4>;
      break;
    default:
      if constexpr (kHeadSize <= 128 && sizeof(T) == 2) kernel = decode_attention<T, kHeadSize, 8>;
  }
  return launch_kernel(kernel, grid_of(p, device.multiprocessors), dim3(kThreads), 0, device, stream, p);
}

}  // namespace

cudaError_t decode_attention_workspace(const AttentionHeads& heads, int32_t max_sequences,
                                       DecodeAttentionWorkspace* result) {
  if (heads.num_heads <= 0 || heads.head_size <= 0 || max_sequences < 0) return cudaErrorInvalidValue;
  const int64_t rows = int64_t{max_sequences} * heads.num_heads;
  result->zeroed_bytes = counter_bytes(rows);
  result->bytes =
      result->zeroed_bytes + rows * kMaxSplits * (heads.head_size + 2) * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

cudaError_t launch_decode_attention(const DecodeAttentionParams& p, cudaStream_t stream) {
  const int64_t columns = int64_t{p.heads.num_heads + 2 * p.heads.num_kv_heads} * p.heads.head_size;
  if (!is_valid(p.heads, p.cache) || p.qkv_row_stride < columns || p.sequences < 0 || p.sequences > 65535 ||
      p.workspace_sequences < p.sequences) {
    return cudaErrorInvalidValue;
  }
  if (p.sequences == 0) return cudaSuccess;
  if (p.qkv == nullptr || p.context == nullptr || p.past_lengths == nullptr || p.workspace == nullptr ||
      reinterpret_cast<uintptr_t>(p.workspace) % sizeof(FullPack) != 0) {
    return cudaErrorInvalidValue;
  }
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return with_type_and_head_size(
      p.heads, [&](auto type, auto head_size) { return launch<decltype(type), head_size.value>(p, device, stream); });
}

}  // namespace qwen_plugins
