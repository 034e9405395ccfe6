// What makes few and short sequences fast, where all of the time is latency: keys and values are loaded before q is
// made ready; a short sequence is not split among blocks, and its query heads get a block each even if they share their
// keys; and no phase is left to a few threads that others could help.
#include <algorithm>

#include "attention_heads.cuh"
#include "decode_attention.h"
#include "launch.h"
#include "programmatic_launch.cuh"

namespace qwen_plugins {
namespace {

constexpr int kMaxWarps = 16;      // of a block that has a multiprocessor for itself
constexpr int kMinWarps = 8;       // of blocks that share it
constexpr int kVecSize = 8;        // elements of a key or value that one lane holds
constexpr int kMinSplit = 32;      // positions
constexpr int kMaxSplits = 32;     // what the last block has to combine: one for each lane of a warp
constexpr int kMaxBlockHeads = 8;  // query heads of a block
// Smaller than any score, yet finite: the difference of two of them is 0 and not NaN.
constexpr float kLowest = -1e30F;

// Query heads of a warp, at most: what registers hold, and for large heads shared memory.
template <int kHeadSize>
constexpr int kMaxWarpHeads = kHeadSize > 128 ? 2 : 4;

__host__ __device__ constexpr int round_up_to_power_of_two(int value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

// 2^x, and 0 instead of a subnormal number.
__device__ __forceinline__ float exp2_approximately(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

struct Arguments {
  DecodeAttentionParams params;
  int heads_per_kv_head;
  int chunks;        // of those, for one block each
  int whole_length;  // up to it, one block reads a sequence faster than many combine their results
};

// Maximum of the scores, and sum of the weights 2^(score - maximum).
struct Partial {
  float maximum = kLowest;
  float sum = 0.0F;
};

// Online softmax of one query head in one lane.
struct SoftmaxState : Partial {
  float values[kVecSize] = {};

  __device__ __forceinline__ void rescale(float new_maximum) {
    const float factor = exp2_approximately(maximum - new_maximum);
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

// What the warps of a block tell each other; each has at most kHeads query heads.
template <int kHeadSize, int kHeads>
struct alignas(16) Shared {
  float queries[kHeads == kMaxWarpHeads<kHeadSize> ? kMaxBlockHeads : kHeads][kHeadSize];
  float new_key[kHeadSize];
  float new_value[kHeadSize];
  float values[kMaxWarps * kHeads][kHeadSize];
  Partial partials[kMaxWarps * kHeads];
  bool is_last_block;
};

// What one block works on.
struct Work {
  int sequence;
  int kv_head;
  int first_head;  // of the query heads
  int num_heads;
  int past_length;
  int begin;  // positions of the cache before the new token's
  int end;
  int num_splits;
  bool has_new_token;
  bool writes_new_token;
};

// The grid is for the longest sequences; a short one is split less, and the blocks that it does not need leave.
__device__ __forceinline__ bool find_work(const Arguments& a, Work& work) {
  const unsigned kv_head = blockIdx.y / static_cast<unsigned>(a.chunks);
  const int chunk = static_cast<int>(blockIdx.y - kv_head * a.chunks);
  const int first = chunk * kMaxBlockHeads;
  const int index = static_cast<int>(blockIdx.x);
  const int grid_size = static_cast<int>(gridDim.x);
  work.sequence = static_cast<int>(blockIdx.z);
  work.kv_head = static_cast<int>(kv_head);
  work.first_head = work.kv_head * a.heads_per_kv_head + first;
  work.num_heads = min(kMaxBlockHeads, a.heads_per_kv_head - first);
  if (work.past_length <= a.whole_length && work.num_heads <= grid_size) {
    const bool exists = index < work.num_heads;
    work.writes_new_token = chunk == 0 && index == 0;
    work.first_head += index;
    work.num_heads = 1;
    work.begin = 0;
    work.end = work.past_length;
    work.num_splits = 1;
    work.has_new_token = true;
    return exists;
  }
  const int split_size = max(kMinSplit, static_cast<int>(static_cast<unsigned>(work.past_length + grid_size - 1) /
                                                         static_cast<unsigned>(grid_size)));
  work.num_splits = max(1, static_cast<int>(static_cast<unsigned>(work.past_length + split_size - 1) /
                                            static_cast<unsigned>(split_size)));
  work.begin = index * split_size;
  work.end = min(work.begin + split_size, work.past_length);
  work.has_new_token = index == work.num_splits - 1;
  work.writes_new_token = work.has_new_token && chunk == 0;
  return index < work.num_splits;
}

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
template <typename T, int kHeadSize, typename SharedMemory>
__device__ __forceinline__ void prepare(const DecodeAttentionParams& p, const Work& work, int rotary_row,
                                        SharedMemory& shared) {
  const T* const qkv = static_cast<const T*>(p.qkv) + work.sequence * p.qkv_row_stride;
  const float* const cos_sin = p.heads.rotary_table + rotary_row * int64_t{p.heads.rotary_dim};
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < work.num_heads + 1; i += warps) {
    if (i < work.num_heads) {
      prepare_head<T, kHeadSize>(shared.queries[i], qkv + (work.first_head + i) * kHeadSize,
                                 static_cast<const T*>(p.heads.q_norm_weight), p.heads, cos_sin,
                                 query_factor(p.heads, rotary_row));
    } else if (work.has_new_token) {
      prepare_new_token<T, kHeadSize>(p, work, qkv, cos_sin, shared.new_key, shared.new_value);
    }
  }
}

__device__ __forceinline__ void load_shared(float (&out)[kVecSize], const float* from) {
#pragma unroll
  for (int i = 0; i < kVecSize / 4; ++i) {
    const float4 part = reinterpret_cast<const float4*>(from)[i];
    out[4 * i] = part.x;
    out[4 * i + 1] = part.y;
    out[4 * i + 2] = part.z;
    out[4 * i + 3] = part.w;
  }
}

template <int kLanes>
__device__ __forceinline__ float dot(const float (&q)[kVecSize], const float (&key)[kVecSize]) {
  float score = 0.0F;
#pragma unroll
  for (int j = 0; j < kVecSize; ++j) score += q[j] * key[j];
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffU, score, offset);
  return score;
}

// The warps of a block: each has a set of kHeads query heads, and all warps of a set share the positions out.
struct WarpRole {
  int set;
  int num_sets;
  int stream;  // of positions
  int num_streams;

  __device__ __forceinline__ WarpRole(int num_heads, int warp_heads) {
    const unsigned warp = threadIdx.x / 32;
    const unsigned warps = blockDim.x / 32;
    // A power of two, as the number of warps.
    const int shift = num_heads <= warp_heads ? 0 : num_heads <= 2 * warp_heads ? 1 : 2;
    num_sets = 1 << shift;
    set = static_cast<int>(warp) & (num_sets - 1);
    stream = static_cast<int>(warp >> shift);
    num_streams = static_cast<int>(warps >> shift);
  }
};

// One warp's pass over its positions: each group of kLanes lanes takes its own, each lane kVecSize elements of them.
template <typename T, int kHeadSize, int kHeads>
class WarpAttention {
 public:
  __device__ __forceinline__ WarpAttention(const DecodeAttentionParams& p, const Work& work, const WarpRole& role)
      : begin_(work.begin + role.stream * kStep), end_(work.end), stride_(role.num_streams * kStep) {
    const T* const cache = static_cast<const T*>(p.cache.data) + element();
    keys_ = cache + cache_offset(p.heads, p.cache, work.sequence, 0, work.kv_head);
    values_ = cache + cache_offset(p.heads, p.cache, work.sequence, 1, work.kv_head);
    load(key_vectors_, keys_, begin_);
    load(value_vectors_, values_, begin_);
  }

  template <typename SharedMemory>
  __device__ __forceinline__ void attend(const Work& work, const WarpRole& role, float scale, SharedMemory& shared) {
    read_shared(work, role, scale, shared);
    for (int start = begin_; start < end_; start += stride_) {
      float scores[kHeads][kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float key[kVecSize];
        to_floats<T>(key, key_vectors_[u]);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float score = dot<kLanes>(q_[h], key);
          scores[h][u] = start + u * kGroups + group() < end_ ? score : -INFINITY;
        }
      }
      const int next = start + stride_;
      if (next < end_) load(key_vectors_, keys_, next);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float maximum = states_[h].maximum;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) maximum = fmaxf(maximum, scores[h][u]);
        states_[h].rescale(maximum);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          scores[h][u] = exp2_approximately(scores[h][u] - maximum);
          states_[h].sum += scores[h][u];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float value[kVecSize];
        to_floats<T>(value, value_vectors_[u]);
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int j = 0; j < kVecSize; ++j) states_[h].values[j] += scores[h][u] * value[j];
      }
      if (next < end_) load(value_vectors_, values_, next);
    }
  }

  // The groups become one, and their results go to shared memory.
  template <typename SharedMemory>
  __device__ __forceinline__ void write(SharedMemory& shared) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      SoftmaxState& state = states_[h];
#pragma unroll
      for (int offset = kLanes; offset < 32; offset *= 2) {
        state.rescale(fmaxf(state.maximum, __shfl_xor_sync(0xffffffffU, state.maximum, offset)));
        state.sum += __shfl_xor_sync(0xffffffffU, state.sum, offset);
#pragma unroll
        for (float& value : state.values) value += __shfl_xor_sync(0xffffffffU, value, offset);
      }
      if (lane() == 0) shared.partials[warp * kHeads + h] = state;
      if (group() == 0 && in_head()) {
        auto* const to = reinterpret_cast<float4*>(shared.values[warp * kHeads + h] + element());
#pragma unroll
        for (int i = 0; i < kVecSize / 4; ++i) {
          to[i] = make_float4(state.values[4 * i], state.values[4 * i + 1], state.values[4 * i + 2],
                              state.values[4 * i + 3]);
        }
      }
    }
  }

 private:
  static constexpr int kLanes = round_up_to_power_of_two(kHeadSize / kVecSize);
  static constexpr int kGroups = 32 / kLanes;
  // Registers for keys and values in flight: what is left, and enough for short sequences to need one step.
  static constexpr int kElements = kHeads * std::max(kHeadSize, 128);
  static constexpr int kRegisters = kElements <= 128 ? 48 : kElements <= 256 ? 32 : 24;
  static constexpr int kVectorRegisters = kVecSize * static_cast<int>(sizeof(T)) / 4;
  static constexpr int kUnroll = kRegisters / (2 * kVectorRegisters);  // positions of a group at a time
  static constexpr int kStep = kGroups * kUnroll;                      // and of a warp

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int group() { return lane() / kLanes; }
  static __device__ __forceinline__ int element() { return lane() % kLanes * kVecSize; }
  static __device__ __forceinline__ bool in_head() { return element() < kHeadSize; }

  __device__ __forceinline__ void load(Vector<T> (&vectors)[kUnroll], const T* from, int start) const {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int position = start + u * kGroups + group();
      vectors[u] = {};
      if (in_head() && position < end_) {
        vectors[u] = *reinterpret_cast<const Vector<T>*>(from + position * int64_t{kHeadSize});
      }
    }
  }

  // q; and the softmax over the new token, where it begins in one group of each set.
  template <typename SharedMemory>
  __device__ __forceinline__ void read_shared(const Work& work, const WarpRole& role, float scale,
                                              const SharedMemory& shared) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const int head = role.set * kHeads + h;
#pragma unroll
      for (float& element : q_[h]) element = 0.0F;
      if (head < work.num_heads && in_head()) load_shared(q_[h], shared.queries[head] + element());
#pragma unroll
      for (float& element : q_[h]) element *= scale;
    }
    if (!work.has_new_token || role.stream != role.num_streams - 1) return;
    float key[kVecSize] = {};
    float value[kVecSize] = {};
    if (in_head()) {
      load_shared(key, shared.new_key + element());
      load_shared(value, shared.new_value + element());
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float score = dot<kLanes>(q_[h], key);
      if (group() != 0) continue;
      states_[h].maximum = score;
      states_[h].sum = 1.0F;
#pragma unroll
      for (int j = 0; j < kVecSize; ++j) states_[h].values[j] = value[j];
    }
  }

  int begin_;
  int end_;
  int stride_;
  const T* keys_;
  const T* values_;
  Vector<T> key_vectors_[kUnroll];
  Vector<T> value_vectors_[kUnroll];
  float q_[kHeads][kVecSize];
  SoftmaxState states_[kHeads];
};

// Combines `count` partial results of one head, at most 32: each lane has one's maximum and sum, and `read(i)` is the
// lane's element of the i-th one's values. Returns that element of the sum; `total` has its maximum and sum.
template <typename Read>
__device__ __forceinline__ float combine(int count, const Partial& of_lane, const Read& read, Partial& total) {
  total.maximum = of_lane.maximum;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total.maximum = fmaxf(total.maximum, __shfl_xor_sync(0xffffffffU, total.maximum, offset));
  }
  const float factor = exp2_approximately(of_lane.maximum - total.maximum);
  total.sum = sum_over_warp(factor * of_lane.sum);
  float result = 0.0F;
#pragma unroll 8
  for (int i = 0; i < count; ++i) result += __shfl_sync(0xffffffffU, factor, i) * read(i);
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
    if (lane < work.num_splits) {
      const float2 read = __ldcg(workspace.partials + place + lane);
      partial.maximum = read.x;
      partial.sum = read.y;
    }
    const auto read = [&](int split) { return __ldcg(workspace.values + (place + split) * kHeadSize + readable); };
    Partial total;
    const float value = combine(work.num_splits, partial, read, total);
    if (d < kHeadSize) {
      static_cast<T*>(p.context)[(first_head + h) * kHeadSize + d] = from_float<T>(__fdividef(value, total.sum));
    }
  });
}

template <typename T, int kHeadSize, int kHeads, typename SharedMemory>
__device__ __forceinline__ void attend_block(const DecodeAttentionParams& p, const Work& work, int rotary_row,
                                             SharedMemory& shared) {
  const WarpRole role(work.num_heads, kHeads);
  WarpAttention<T, kHeadSize, kHeads> attention(p, work, role);
  prepare<T, kHeadSize>(p, work, rotary_row, shared);
  __syncthreads();
  attention.attend(work, role, p.softmax_scale * 1.44269504F, shared);  // log2(e), for exp2
  attention.write(shared);
  __syncthreads();

  const Workspace workspace = workspace_of(p);
  const int64_t first_head = int64_t{work.sequence} * p.heads.num_heads + work.first_head;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_elements<kHeadSize>(work.num_heads, [&](int h, int d) {
    const auto place = [&](int stream) { return (stream * role.num_sets + h / kHeads) * kHeads + h % kHeads; };
    const int readable = min(d, kHeadSize - 1);
    Partial total;
    const float value = combine(
        role.num_streams, lane < role.num_streams ? shared.partials[place(lane)] : Partial(),
        [&](int stream) { return shared.values[place(stream)][readable]; }, total);
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

template <typename T, int kHeadSize, int kHeads>
__global__ void __launch_bounds__(32 * kMaxWarps) decode_attention(const __grid_constant__ Arguments a) {
  __shared__ Shared<kHeadSize, kHeads> shared;
  trigger_dependent_launch();
  wait_for_previous_kernel();
  Work work;
  work.past_length = a.params.past_lengths[blockIdx.z];
  const int rotary_row = rotary_offset(a.params.heads, static_cast<int>(blockIdx.z)) + work.past_length;
  if (!find_work(a, work)) return;
  if constexpr (kHeads > 1) {
    if (work.num_heads == 1) {
      attend_block<T, kHeadSize, 1>(a.params, work, rotary_row, shared);
      return;
    }
  }
  attend_block<T, kHeadSize, kHeads>(a.params, work, rotary_row, shared);
}

struct LaunchSize {
  dim3 blocks;
  unsigned threads;
};

// Large blocks, one a multiprocessor, if that is enough for every query head; otherwise two small ones.
LaunchSize launch_size(const Arguments& a, int multiprocessors) {
  const DecodeAttentionParams& p = a.params;
  const int block_heads = std::min(a.heads_per_kv_head, kMaxBlockHeads);
  const int blocks_y = p.heads.num_kv_heads * a.chunks;
  const int64_t blocks = int64_t{blocks_y} * p.sequences;
  const bool large = blocks * block_heads <= multiprocessors;
  const int wanted = static_cast<int>((large ? 1 : 2) * multiprocessors / blocks);
  const int useful = std::max(block_heads, (p.cache.max_positions + kMinSplit - 1) / kMinSplit);
  const int splits = std::max(1, std::min({wanted, useful, kMaxSplits}));
  return {{static_cast<unsigned>(splits), static_cast<unsigned>(blocks_y), static_cast<unsigned>(p.sequences)},
          32U * (large ? kMaxWarps : kMinWarps)};
}

template <typename T, int kHeadSize>
cudaError_t launch(const DecodeAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  const int heads_per_kv_head = p.heads.num_heads / p.heads.num_kv_heads;
  // More heads make a split's work longer, not a whole sequence's; measured with 1 and 7 heads.
  const int whole_length = std::min(512 + 128 * (heads_per_kv_head - 1), 1280);
  const Arguments arguments{p, heads_per_kv_head, (heads_per_kv_head + kMaxBlockHeads - 1) / kMaxBlockHeads,
                            whole_length};
  auto* kernel = decode_attention<T, kHeadSize, kMaxWarpHeads<kHeadSize>>;
  if (heads_per_kv_head == 1) kernel = decode_attention<T, kHeadSize, 1>;
  if (heads_per_kv_head == 2) kernel = decode_attention<T, kHeadSize, 2>;
  const LaunchSize size = launch_size(arguments, device.multiprocessors);
  return launch_kernel(kernel, size.blocks, dim3(size.threads), 0, device, stream, arguments);
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
  if (!is_valid(p.heads, p.cache) || p.qkv_row_stride < columns || p.sequences < 0 || p.sequences > 65535) {
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
