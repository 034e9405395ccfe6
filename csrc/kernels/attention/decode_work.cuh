// What a block of decode.cu works on, and what its warps exchange.
#pragma once

#include "decode.h"
#include "heads.cuh"
#include "kernels/common/arithmetic.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace qwen_plugins::decoding {

constexpr int kSplitStep = 32;  // positions, of which the splits' lengths are multiples: those of the longest tile
constexpr int kMinSplit = 32;   // positions
constexpr int kInvariantMinSplit = 256;  // with batch_invariant: short enough to use a GPU with one sequence
constexpr int kMaxSplits = 32;           // combined by the last block: one for each lane of a warp
constexpr int kMaxCluster = 8;           // blocks; every device with clusters has this many
constexpr int kUnsplit = 64;             // up to this many positions one block is faster than a cluster

struct Arguments {
  DecodeAttentionParams params;
  CacheLayout layout;
  int heads_per_kv_head;
  int block_heads;   // of those, in one block
  int chunks;        // blocks for all of those heads
  int cluster;       // its size: all splits of a sequence; 1: splits are combined through the workspace
  int splits;        // the most of a sequence
  int min_split;     // positions
  int whole_length;  // up to this many positions, one block is faster than several that combine their results
  int longest;       // the most positions of a sequence
  bool prefetches;   // while the previous kernel runs; only where all blocks are resident at once
};

// Stands for the element type of qkv where a kernel is for all of them: those for a cache of 8 bits, in which it only
// decides how q, k and v are read and the context is written.
struct AnyFloat {};

// Calls `function(E{})` with the element type E of qkv: T or, for AnyFloat, that of `dtype`.
template <typename T, typename Function>
__device__ __forceinline__ void with_element(DataType dtype, const Function& function) {
  if constexpr (!std::is_same_v<T, AnyFloat>) {
    function(T{});
  } else if (dtype == DataType::kFloat16) {
    function(__half{});
  } else if (dtype == DataType::kBFloat16) {
    function(__nv_bfloat16{});
  } else {
    function(float{});
  }
}

// Maximum of the scores, and sum of the weights 2^(score - maximum).
struct Partial {
  float maximum = kLowestScore;
  float sum = 0.0F;

  Partial() = default;
  __device__ __forceinline__ explicit Partial(float2 pair) : maximum(pair.x), sum(pair.y) {}
};

// The neighbouring elements of a partial result that one lane has.
template <int kCount>
struct alignas(4 * kCount) Elements {
  float at[kCount];
};

// What every block has in shared memory.
template <int kHeadSize, int kHeads>
struct alignas(16) SharedInputs {
  float queries[kHeads][kHeadSize];
  float new_key[kHeadSize];
  float new_value[kHeadSize];
  float new_scales[2];   // of new_key and new_value, which are codes in a cache of 8 bits
  float context_factor;  // 1 / scale, of a context of 8 bits
  bool is_last_block;
};

// The numbers of a sequence's pages, of which the lanes of a warp have 32 at a time. The first are loaded together with
// the length of the sequence: a load after that would delay the first keys.
class PageNumbers {
 public:
  PageNumbers() = default;
  __device__ __forceinline__ PageNumbers(const KvCache& cache, int sequence) {
    if (cache.pages == nullptr) return;
    table_ = cache.pages + sequence * int64_t{cache.pages_row_stride};
    size_ = cache.pages_row_stride;
    load(0);
  }
  __device__ __forceinline__ bool exist() const { return table_ != nullptr; }
  // The page that has a position, the same for all lanes of a warp and not below that of the last call.
  __device__ __forceinline__ int operator()(int position) {
    const int index = static_cast<unsigned>(position) / kPageSize;
    if (table_ == nullptr) return index;
    if (index >= first_ + 32) load(index);
    return __shfl_sync(0xffffffffU, numbers_, index - first_);
  }

 private:
  __device__ __forceinline__ void load(int first) {
    first_ = first;
    const int index = first + static_cast<int>(threadIdx.x) % 32;
    if (index < size_) numbers_ = table_[index];
  }

  const int32_t* table_ = nullptr;  // of the sequence; null: its pages follow each other
  int size_ = 0;
  int first_ = 0;
  int numbers_ = 0;
};

struct Work {
  PageNumbers pages;
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

// Fills in the rest of `work`, whose past_length is known. The grid is made for the longest sequences; a short one is
// split into fewer blocks. Splits begin at multiples of kSplitStep, so that no tile straddles two pages. Returns false
// in the blocks that the sequence does not need.
__device__ __forceinline__ bool find_work(const Arguments& a, Work& work) {
  const unsigned kv_head = blockIdx.y / static_cast<unsigned>(a.chunks);
  const int chunk = static_cast<int>(blockIdx.y - kv_head * a.chunks);
  const int index = static_cast<int>(blockIdx.x);
  const int grid_size = static_cast<int>(gridDim.x);
  work.sequence = static_cast<int>(blockIdx.z);
  work.kv_head = static_cast<int>(kv_head);
  work.first_head = work.kv_head * a.heads_per_kv_head + chunk * a.block_heads;
  work.num_heads = min(a.block_heads, a.heads_per_kv_head - chunk * a.block_heads);
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
  // Where there are fewer blocks than heads, shorter sequences are split, too; measured with 7 and 8 heads.
  const int splits = work.past_length <= (a.cluster > 1 ? kUnsplit : a.whole_length / 3) ? 1 : a.splits;
  const auto past = static_cast<unsigned>(work.past_length);
  const int split_size =
      max(a.min_split, static_cast<int>(divide_up(divide_up(past, splits), kSplitStep)) * kSplitStep);
  // All blocks of a cluster take part, even those without a position to read.
  work.num_splits = a.cluster > 1 ? splits : max(1, static_cast<int>(divide_up(past, split_size)));
  work.begin = index * split_size;
  work.end = min(work.begin + split_size, work.past_length);
  work.has_new_token = index == work.num_splits - 1;
  work.writes_new_token = work.has_new_token && chunk == 0;
  return index < work.num_splits;
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

}  // namespace qwen_plugins::decoding
