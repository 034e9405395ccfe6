// With few, short sequences the time is latency alone. What keeps it short: loads of keys and values are issued before
// q is prepared; a short sequence is not split among blocks, or only among those of one cluster; and all threads of a
// block take part in every phase.
#include <algorithm>
#include <limits>

#include "decode.h"
#include "decode_cluster.cuh"
#include "decode_tiles.cuh"
#include "decode_vectors.cuh"
#include "decode_work.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"

namespace qwen_plugins {
namespace {

using namespace decoding;

// Up to this many positions one cluster is faster than more blocks that combine their splits through the workspace.
constexpr int kShortCache = 2048;

// One warp replaces a head in shared memory by its codes, and returns their scale.
template <int kHeadSize>
__device__ __forceinline__ float quantize_head(float* head, CacheDataType dtype) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float largest = 0.0F;
#pragma unroll
  for (int d = lane; d < kHeadSize; d += 32) largest = larger_magnitude(largest, head[d]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
  }
  const float scale = cache_scale(largest, dtype);
  const CodeOf code(scale, dtype);
#pragma unroll
  for (int d = lane; d < kHeadSize; d += 32) {
    float values[4];
    codes_to_floats(values, code(head[d]), dtype);
    head[d] = values[0];
  }
  return scale;
}

// Prepares the new key or value in shared memory, and writes it to the cache if this block is the one that does.
template <typename E, int kHeadSize, typename Attention>
__device__ __forceinline__ void prepare_new_token(const Arguments& a, const Work& work, bool is_value, const E* qkv,
                                                  const float* cos_sin, typename Attention::SharedMemory& shared) {
  const DecodeAttentionParams& p = a.params;
  const CacheDataType dtype = p.cache.dtype;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const HeadCacheOf<E, kHeadSize, Attention::kQuantized> cache(p.cache, a.layout, work.sequence, work.kv_head);
  const int page = work.writes_new_token ? page_of(p.cache, work.sequence, work.past_length) : 0;
  const E* const from = qkv + (p.heads.num_heads + (is_value ? p.heads.num_kv_heads : 0) + work.kv_head) * kHeadSize;
  float* const head = is_value ? shared.new_value : shared.new_key;
  if (is_value) {
#pragma unroll
    for (int d = lane; d < kHeadSize; d += 32) head[d] = to_float(from[d]);
  } else {
    prepare_head<E, kHeadSize>(head, from, static_cast<const E*>(p.heads.k_norm_weight), p.heads, cos_sin, 1.0F);
  }
  float scale = 1.0F;
  if constexpr (Attention::kQuantized) {
    scale = quantize_head<kHeadSize>(head, dtype);
    shared.new_scales[is_value ? 1 : 0] = scale;
  }
  if (!work.writes_new_token) return;
  char* const to = cache.key(page, work.past_length) + (is_value ? cache.value_bytes() : 0);
  if constexpr (Attention::kQuantized) {
    *(is_value ? cache.value_scale(page, work.past_length) : cache.key_scale(page, work.past_length)) = scale;
    const CodeOf code(1.0F, dtype);
#pragma unroll
    for (int d = lane; d < kHeadSize; d += 32) to[d] = static_cast<char>(code(head[d]));
  } else {
#pragma unroll
    for (int d = lane; d < kHeadSize; d += 32) reinterpret_cast<E*>(to)[d] = from_float<E>(head[d]);
  }
}

// Prepares q in shared memory, and the new key and value if they belong to this block's split.
template <typename T, int kHeadSize, typename Attention>
__device__ __forceinline__ void prepare(const Arguments& a, const Work& work, int rotary_row,
                                        typename Attention::SharedMemory& shared) {
  const DecodeAttentionParams& p = a.params;
  const float* const cos_sin = p.heads.rotary_table + rotary_row * int64_t{p.heads.rotary_dim};
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  Attention::clear_other_queries(shared, work.num_heads);
  const int first = warp - Attention::first_preparing_warp();
  const int heads = work.num_heads + (work.has_new_token ? 2 : 0);
  const int items = p.context_scale == nullptr ? heads : heads + 1;
  for (int i = first < 0 ? first + warps : first; i < items; i += warps) {
    if (i == heads) {
      shared.context_factor = finite_reciprocal(*p.context_scale);
      break;
    }
    with_element<T>(p.heads.dtype, [&](auto element) {
      using E = decltype(element);
      const E* const qkv = static_cast<const E*>(p.qkv) + work.sequence * p.qkv_row_stride;
      if (i < work.num_heads) {
        prepare_head<E, kHeadSize>(shared.queries[i], qkv + (work.first_head + i) * kHeadSize,
                                   static_cast<const E*>(p.heads.q_norm_weight), p.heads, cos_sin,
                                   query_factor(p.heads, rotary_row));
      } else {
        prepare_new_token<E, kHeadSize, Attention>(a, work, i > work.num_heads, qkv, cos_sin, shared);
      }
    });
    if (i < work.num_heads) Attention::pack_query(shared, i);
  }
}

// Combines `count` partial results of one head, at most 32. Lane i has the maximum and sum of the i-th, and `read(i)`
// returns the calling lane's elements of its values. Returns the lane's elements of the combined values, with their
// maximum and sum in `total`. kAtOnce reads are issued before the first is used: they may be remote.
template <int kAtOnce, int kCount, typename Read>
__device__ __forceinline__ Elements<kCount> combine(int count, const Partial& of_lane, const Read& read,
                                                    Partial& total) {
  total.maximum = of_lane.maximum;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total.maximum = fmaxf(total.maximum, __shfl_xor_sync(0xffffffffU, total.maximum, offset));
  }
  const float factor = exp2_approximately(of_lane.maximum - total.maximum);
  total.sum = sum_over_warp(factor * of_lane.sum);
  Elements<kCount> result = {};
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    Elements<kCount> values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = first + i < count ? read(first + i) : Elements<kCount>{};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float weight = __shfl_sync(0xffffffffU, factor, first + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) result.at[j] += weight * values[i].at[j];
    }
  }
  return result;
}

// The workspace: for each sequence, head and split the values [head_size]; after all of these, of each the maximum and
// sum.
struct Workspace {
  float* values;
  float2* partials;
};

__device__ __forceinline__ Workspace workspace_of(const DecodeAttentionParams& p) {
  const int64_t results = int64_t{p.sequences} * p.heads.num_heads * gridDim.x;
  float* const values = static_cast<float*>(p.workspace);
  return {values, reinterpret_cast<float2*>(values + results * p.heads.head_size)};
}

// Returns true in the last of `num_splits` blocks to arrive, which then sees what all of them wrote.
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

// Calls `function(head, element)` for every kCount-th element of the heads of a block. All lanes of a warp call it
// together, so that the element may lie beyond the end of the head.
template <int kHeadSize, int kCount, typename Function>
__device__ __forceinline__ void for_elements(int num_heads, const Function& function) {
  constexpr unsigned kParts = (kHeadSize + 32 * kCount - 1) / (32 * kCount);
  const unsigned warps = blockDim.x / 32;
#pragma unroll 1
  for (unsigned i = threadIdx.x / 32; i < num_heads * kParts; i += warps) {
    function(static_cast<int>(i / kParts), static_cast<int>((i % kParts * 32 + threadIdx.x % 32) * kCount));
  }
}

// Writes kCount elements of a head's result from d on: `value` divided by the sum of the softmax. `factor` is of codes.
template <typename T, int kHeadSize, int kCount>
__device__ __forceinline__ void write_context(const DecodeAttentionParams& p, const float& factor, int64_t head, int d,
                                              const Elements<kCount>& value, const Partial& total) {
  if (d >= kHeadSize) return;
  if (p.context_scale != nullptr) {
    float scaled[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) scaled[i] = __fdividef(value.at[i], total.sum) * factor;
    return store_context_codes(static_cast<uint8_t*>(p.context) + head * kHeadSize + d, scaled, p.context_dtype);
  }
  with_element<T>(p.heads.dtype, [&](auto element) {
    using E = decltype(element);
    E* const to = static_cast<E*>(p.context) + head * kHeadSize + d;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from_float<E>(__fdividef(value.at[i], total.sum));
  });
}

// Combines the results of the block's warps and calls `put(head, element, value, total)` with them.
template <int kHeadSize, typename Attention, typename Put>
__device__ __forceinline__ void combine_warps(int num_heads, typename Attention::SharedMemory& shared, const Put& put) {
  // With a single head, single elements give more warps work.
  constexpr int kCount = Attention::kHeads == 1 ? 1 : 4;
  constexpr int kAtOnce = Attention::kHeads == 1 ? 16 : 8;
  const int count = Attention::num_partials();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_elements<kHeadSize, kCount>(num_heads, [&](int h, int d) {
    const int readable = min(d, kHeadSize - kCount);
    Partial partial;
    if (lane < count) partial = Partial(shared.partial(lane, h));
    const auto read = [&](int warp) {
      return *reinterpret_cast<const Elements<kCount>*>(shared.values(warp, h) + readable);
    };
    Partial total;
    const Elements<kCount> value = combine<kAtOnce, kCount>(count, partial, read, total);
    put(h, d, value, total);
  });
}

// Combines what the blocks of the cluster have sent to this one.
template <typename T, int kHeadSize>
__device__ __forceinline__ void combine_inbox(const DecodeAttentionParams& p, const float& factor, const Work& work,
                                              int64_t first_head, int rank, int size, const Inbox<kHeadSize>& inbox) {
  const int heads = Inbox<kHeadSize>::num_own_heads(rank, size, work.num_heads);
  if (heads == 0) return;
  inbox.wait();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_elements<kHeadSize, 1>(heads, [&](int i, int d) {
    const int readable = min(d, kHeadSize - 1);
    const auto row = [&](int block) { return inbox.row(i, block, size); };
    Partial partial;
    if (lane < size) partial = Partial(inbox.partial(row(lane)));
    const auto read = [&](int block) { return Elements<1>{{inbox.values(row(block))[readable]}}; };
    Partial total;
    const Elements<1> value = combine<kMaxCluster, 1>(size, partial, read, total);
    write_context<T, kHeadSize>(p, factor, first_head + rank + i * size, d, value, total);
  });
}

// Combines the splits of all blocks, from the workspace.
template <typename T, int kHeadSize>
__device__ __forceinline__ void combine_splits(const DecodeAttentionParams& p, const float& factor, const Work& work,
                                               const Workspace& workspace, int64_t first_head) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for_elements<kHeadSize, 2>(work.num_heads, [&](int h, int d) {
    const int64_t place = (first_head + h) * gridDim.x;
    const int readable = min(d, kHeadSize - 2);
    Partial partial;
    if (lane < work.num_splits) partial = Partial(__ldcg(workspace.partials + place + lane));
    const auto read = [&](int split) {
      const float* const from = workspace.values + (place + split) * kHeadSize + readable;
      return bit_cast<Elements<2>>(__ldcg(reinterpret_cast<const float2*>(from)));
    };
    Partial total;
    const Elements<2> value = combine<kMaxSplits / 2, 2>(work.num_splits, partial, read, total);
    write_context<T, kHeadSize>(p, factor, first_head + h, d, value, total);
  });
}

template <typename T, int kHeadSize, typename Attention>
__device__ __forceinline__ void attend_block(const Arguments& a, const Work& work, int rotary_row,
                                             typename Attention::SharedMemory& shared) {
  const DecodeAttentionParams& p = a.params;
  const int rank = static_cast<int>(blockIdx.x);
  const bool in_cluster = Attention::kInClusters && a.cluster > 1 && work.num_splits > 1;
  Attention attention(a, work, shared);
  if constexpr (Attention::kInClusters) {
    if (in_cluster) shared.inbox.open(rank, a.cluster, work.num_heads);
  }
  prepare<T, kHeadSize, Attention>(a, work, rotary_row, shared);
  __syncthreads();
  attention.attend(p, work, p.softmax_scale * kLog2E, shared);
  attention.write(shared);
  __syncthreads();

  const Workspace workspace = workspace_of(p);
  const int64_t first_head = int64_t{work.sequence} * p.heads.num_heads + work.first_head;
  if constexpr (Attention::kInClusters) {
    if (in_cluster) shared.inbox.wait_until_open();
  }
  combine_warps<kHeadSize, Attention>(
      work.num_heads, shared, [&](int h, int d, const auto& value, const Partial& total) {
        if (work.num_splits == 1) {
          return write_context<T, kHeadSize>(p, shared.context_factor, first_head + h, d, value, total);
        }
        if (d >= kHeadSize) return;
        if constexpr (Attention::kInClusters) {
          if (in_cluster) return shared.inbox.send(h, d, value, total, rank, a.cluster);
        }
        const int64_t split = (first_head + h) * gridDim.x + blockIdx.x;
        *reinterpret_cast<std::decay_t<decltype(value)>*>(workspace.values + split * kHeadSize + d) = value;
        if (d == 0) workspace.partials[split] = make_float2(total.maximum, total.sum);
      });
  if (work.num_splits == 1) return;
  if constexpr (Attention::kInClusters) {
    if (in_cluster) {
      return combine_inbox<T, kHeadSize>(p, shared.context_factor, work, first_head, rank, a.cluster, shared.inbox);
    }
  }
  if (!is_last_block(p.semaphores + first_head, work.num_splits, shared.is_last_block)) return;
  combine_splits<T, kHeadSize>(p, shared.context_factor, work, workspace, first_head);
}

// Prefetches positions of the cache from the beginning of the block's split up to `end` to the L2 cache: lane 2 i the
// keys in the i-th of their pages, lane 2 i + 1 the values.
template <typename T, int kHeadSize, bool kQuantized>
__device__ __forceinline__ void prefetch_page(const Arguments& a, const Work& work, int lane, int end) {
  if constexpr (kHasHopperInstructions) {
    using Cache = HeadCacheOf<T, kHeadSize, kQuantized>;
    constexpr int kTokenBytes = kHeadSize * (kQuantized ? 1 : static_cast<int>(sizeof(T)));
    const int first = max(work.begin, (work.begin / kPageSize + lane / 2) * kPageSize);
    const int positions = min(end, (first / kPageSize + 1) * kPageSize) - first;
    if (positions <= 0) return;
    const Cache cache(a.params.cache, a.layout, work.sequence, work.kv_head);
    const int page = page_of(a.params.cache, work.sequence, first);
    const int64_t offset = lane % 2 == 0 ? 0 : cache.value_bytes();
    bulk_prefetch_to_l2(cache.key(page, first) + offset, positions * kTokenBytes);
    if constexpr (kQuantized) {
      const auto* const scales = lane % 2 == 0 ? cache.key_scale(page, first) : cache.value_scale(page, first);
      bulk_prefetch_to_l2(scales, divide_up(positions, 4) * 16);
    }
  }
}

// Prefetches to the L2 cache, while the previous kernel may still run, what this block reads first: the projections,
// the row of the rotary table, keys and values. Only a hint: it may use a length that the previous kernel is about to
// change.
template <typename T, int kHeadSize, typename Attention>
__device__ __forceinline__ void prefetch(const Arguments& a) {
  constexpr int kLine = 128;
  if (threadIdx.x >= 32 || !a.prefetches) return;
  const int lane = static_cast<int>(threadIdx.x);
  const DecodeAttentionParams& p = a.params;
  Work work;
  work.past_length = *static_cast<const volatile int32_t*>(p.past_lengths + blockIdx.z);
  work.past_length = max(0, min(work.past_length, a.longest - 1));
  if (!find_work(a, work)) return;
  int element_bytes = 0;
  with_element<T>(p.heads.dtype, [&](auto element) { element_bytes = static_cast<int>(sizeof(element)); });
  const int head_bytes = kHeadSize * element_bytes;
  const char* const qkv = static_cast<const char*>(p.qkv) + work.sequence * p.qkv_row_stride * element_bytes;
  const int key = p.heads.num_heads + work.kv_head;
  for (int i = kLine * lane; i < head_bytes * work.num_heads; i += kLine * 32) {
    prefetch_to_l2(qkv + work.first_head * head_bytes + i);
  }
  int rotary_row = work.past_length;
  if (p.heads.rotary_offsets != nullptr) {
    rotary_row += *static_cast<const volatile int32_t*>(p.heads.rotary_offsets + blockIdx.z);
  }
  if (rotary_row >= 0 && lane * 32 < p.heads.rotary_dim) {
    prefetch_to_l2(p.heads.rotary_table + rotary_row * int64_t{p.heads.rotary_dim} + lane * 32);
  }
  if (lane < 2) {  // lane 0: key, lane 1: value
    for (int i = 0; i < head_bytes; i += kLine) {
      prefetch_to_l2(qkv + (key + lane * p.heads.num_kv_heads) * head_bytes + i);
    }
  }
  // As many positions as the block has in flight; twice as many where it reads the whole sequence alone.
  const int most = static_cast<int>(blockDim.x) / (work.num_splits == 1 ? 2 : 4);
  prefetch_page<T, kHeadSize, Attention::kQuantized>(a, work, lane, min(work.end, work.begin + most));
}

// What computes a single head that is not split, in the same shared memory, which has room for either.
template <typename T, int kHeadSize, typename Attention>
using SingleHead = std::conditional_t<Attention::kQuantized, Attention, VectorAttention<T, kHeadSize>>;

template <typename T, int kHeadSize, typename Attention>
__global__ void __launch_bounds__(32 * Attention::kWarps, 1) decode_attention(const __grid_constant__ Arguments a) {
  using Single = SingleHead<T, kHeadSize, Attention>;
  extern __shared__ __align__(16) char shared[];
  trigger_dependent_launch();
  prefetch<T, kHeadSize, Attention>(a);
  wait_for_previous_kernel();
  const int offset = rotary_offset(a.params.heads, static_cast<int>(blockIdx.z));
  Work work;
  work.past_length = a.params.past_lengths[blockIdx.z];
  work.pages = PageNumbers(a.params.cache, static_cast<int>(blockIdx.z));
  if (!find_work(a, work)) return;
  const int rotary_row = offset + work.past_length;
  if (std::is_same_v<Single, Attention> || (work.num_heads == 1 && work.num_splits == 1)) {
    auto& memory = *reinterpret_cast<typename Single::SharedMemory*>(shared);
    attend_block<T, kHeadSize, Single>(a, work, rotary_row, memory);
  } else {
    auto& memory = *reinterpret_cast<typename Attention::SharedMemory*>(shared);
    attend_block<T, kHeadSize, Attention>(a, work, rotary_row, memory);
  }
}

struct Grid {
  int warps;  // of a block
  int splits;
  int cluster;  // all splits, or 1
};

// Large blocks, one for each multiprocessor, if every query head can have one; otherwise two small blocks on each
// multiprocessor, or four. The sequences are split into as many blocks as are resident at the same time, if the cache
// is long enough for so many. With batch_invariant the number of sequences does not count.
template <typename Attention>
Grid find_grid(const DecodeAttentionParams& p, int64_t blocks, int longest, const DeviceProperties& device) {
  const int heads = std::min(p.heads.num_heads / p.heads.num_kv_heads, Attention::kHeads);
  if (p.batch_invariant) {
    return {Attention::kWarps / 2, std::max(heads, std::min(divide_up(longest, kInvariantMinSplit), kMaxSplits)), 1};
  }
  const bool fits = Attention::shared_bytes(Attention::kWarps) <= device.max_shared_memory_per_block;
  const bool large = fits && int64_t{p.heads.num_heads} * p.sequences <= device.multiprocessors;
  const int at_once = (large ? 1 : 2) * device.multiprocessors;
  const int divisor = large ? 1 : blocks <= at_once ? 2 : 4;
  const int useful = std::max(heads, divide_up(longest, kMinSplit));
  const bool clusters = Attention::kInClusters && device.programmatic_launch;  // a device has both or neither
  // Not every multiprocessor has free neighbours for a cluster: of an H200's 132, clusters of any size can use 105.
  const int cluster = std::min({static_cast<int>(at_once * 4 / 5 / blocks), useful, kMaxCluster});
  if (clusters && large && longest <= kShortCache && cluster > 1) {
    return {Attention::kWarps, cluster, cluster};
  }
  const int splits = std::max(1, std::min({static_cast<int>(at_once / blocks), useful, kMaxSplits}));
  return {Attention::kWarps / divisor, splits, 1};
}

template <typename T, int kHeadSize, typename Attention>
cudaError_t launch_blocks(const DecodeAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  using Single = SingleHead<T, kHeadSize, Attention>;
  const int heads_per_kv_head = p.heads.num_heads / p.heads.num_kv_heads;
  const int chunks = divide_up(heads_per_kv_head, Attention::kHeads);
  const int64_t blocks = int64_t{p.heads.num_kv_heads} * chunks * p.sequences;
  const int longest =
      static_cast<int>(std::min<int64_t>(max_sequence_positions(p.cache), std::numeric_limits<int32_t>::max()));
  const Grid found = find_grid<Attention>(p, blocks, longest, device);
  const int at_once = device.multiprocessors * (Attention::kWarps / found.warps);
  Arguments a{p, HeadCacheOf<T, kHeadSize, Attention::kQuantized>::layout_of(p.heads, p.cache)};
  a.heads_per_kv_head = heads_per_kv_head;
  a.block_heads = Attention::kHeads;
  a.chunks = chunks;
  a.cluster = found.cluster;
  a.splits = p.batch_invariant ? kMaxSplits : found.splits;
  a.min_split = p.batch_invariant ? kInvariantMinSplit : found.cluster > 1 ? 1 : kMinSplit;
  a.whole_length = std::min(heads_per_kv_head, Attention::kHeads) == 1 ? 512 : found.cluster > 1 ? 320 : 1024;
  a.longest = longest;
  a.prefetches = blocks * found.splits <= at_once;
  const dim3 grid(static_cast<unsigned>(found.splits), static_cast<unsigned>(p.heads.num_kv_heads * chunks),
                  static_cast<unsigned>(p.sequences));
  const dim3 threads(32U * static_cast<unsigned>(found.warps));
  auto* const kernel = decode_attention<T, kHeadSize, Attention>;
  const int shared_bytes = std::max(Attention::shared_bytes(found.warps), Single::shared_bytes(found.warps));
  // The same value for all launches: it is an attribute of the kernel, on which launches captured in graphs rely, too.
  const int most =
      std::max(shared_bytes, std::min(Attention::shared_bytes(Attention::kWarps), device.max_shared_memory_per_block));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  return launch_clusters(kernel, grid, threads, shared_bytes, found.cluster, device, stream, a);
}

template <typename T, int kHeadSize>
cudaError_t launch(const DecodeAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  if (p.cache.dtype != CacheDataType::kSame) {
    return launch_blocks<AnyFloat, kHeadSize, TileAttention<AnyFloat, kHeadSize, true>>(p, device, stream);
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (p.heads.num_heads > p.heads.num_kv_heads) {
      return launch_blocks<T, kHeadSize, TileAttention<T, kHeadSize, false>>(p, device, stream);
    }
  }
  return launch_blocks<T, kHeadSize, VectorAttention<T, kHeadSize>>(p, device, stream);
}

}  // namespace

cudaError_t decode_attention_workspace_bytes(const AttentionHeads& heads, int32_t sequences, int64_t* bytes) {
  if (heads.num_heads <= 0 || heads.num_heads > kMaxHeads || heads.head_size <= 0 ||
      heads.head_size > kHeadSizes.back() || sequences < 0 || sequences > kMaxDecodeSequences || bytes == nullptr) {
    return cudaErrorInvalidValue;
  }
  const int64_t rows = int64_t{sequences} * heads.num_heads;
  *bytes = rows * kMaxSplits * (heads.head_size + 2) * static_cast<int64_t>(sizeof(float));
  return cudaSuccess;
}

cudaError_t launch_decode_attention(const DecodeAttentionParams& p, cudaStream_t stream) {
  const int64_t columns = int64_t{p.heads.num_heads + 2 * p.heads.num_kv_heads} * p.heads.head_size;
  if (!is_valid(p.heads, p.cache) || (p.qkv_row_stride < columns && p.sequences > 1) || p.sequences < 0 ||
      p.sequences > kMaxDecodeSequences) {
    return cudaErrorInvalidValue;
  }
  if (p.sequences == 0) return cudaSuccess;
  if (p.qkv == nullptr || p.context == nullptr || p.past_lengths == nullptr || p.workspace == nullptr ||
      p.semaphores == nullptr || reinterpret_cast<uintptr_t>(p.workspace) % sizeof(FullPack) != 0 ||
      (p.context_scale != nullptr &&
       (!is_context_code(p.context_dtype) || reinterpret_cast<uintptr_t>(p.context) % sizeof(FullPack) != 0))) {
    return cudaErrorInvalidValue;
  }
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return with_type_and_head_size(
      p.heads, [&](auto type, auto head_size) { return launch<decltype(type), head_size.value>(p, device, stream); });
}

}  // namespace qwen_plugins
