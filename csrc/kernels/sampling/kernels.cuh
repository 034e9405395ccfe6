// The pieces of the sampling kernels: a row of logits, choices that can be compared, random numbers, and what the
// blocks of one sequence do together.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>

#include "kernels/common/elements.cuh"
#include "sampling.h"

namespace qwen_plugins {

// A token and its score in one number: the larger wins, of equal scores the lower token. 0 stands for no token.
using Choice = unsigned long long;

// Orders as floats do, NaN above +infinity; -0 and +0 are the same. Never 0.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value + 0.0F);  // the addition makes every NaN 0x7fffffff
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
__device__ __forceinline__ Choice make_choice(float score, int32_t token) {
  return static_cast<Choice>(ordered_bits(score)) << 32 | ~static_cast<uint32_t>(token);
}
__device__ __forceinline__ float score_of(Choice choice) {
  const auto ordered = static_cast<uint32_t>(choice >> 32);
  return bit_cast<float>((ordered & 0x80000000U) != 0 ? ordered & 0x7fffffffU : ~ordered);
}
__device__ __forceinline__ int32_t token_of(Choice choice) {
  return static_cast<int32_t>(~static_cast<uint32_t>(choice));
}

// Whether the best choice of a row is valid: not where a logit is NaN or +infinity, or all are -infinity.
__device__ __forceinline__ bool is_finite(Choice choice) { return fabsf(score_of(choice)) < INFINITY; }

// The larger one; NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The logits of a sequence, in groups of kWidth: full packs or single ones.
template <typename T, int kWidth>
struct Row {
  const T* logits;
  const uint32_t* seen;  // null: no penalty
  int32_t vocab_size;    // a multiple of kWidth
  float penalty;

  __device__ __forceinline__ Row(const SamplingParams& p, int32_t sequence, float repetition_penalty)
      : logits(static_cast<const T*>(p.logits) + sequence * p.logits_row_stride),
        seen(p.seen == nullptr || repetition_penalty == 1.0F
                 ? nullptr
                 : p.seen + static_cast<int64_t>(sequence) * ((p.vocab_size + 31) / 32)),
        vocab_size(p.vocab_size),
        penalty(repetition_penalty) {}

  __device__ __forceinline__ int32_t groups() const { return vocab_size / kWidth; }

  // Low bits that are zeros in all logits, as floats.
  __device__ __forceinline__ int zero_bits() const {
    if (seen != nullptr || std::is_same_v<T, float>) return 0;
    return std::is_same_v<T, __half> ? 13 : 16;
  }

  // Calls visit(values, first token) for this thread's groups of those from `begin` to `end`: logits after the
  // repetition penalty. A few groups are loaded before the first is used.
  template <int kAtOnce, typename Visit>
  __device__ __forceinline__ void for_each(int32_t begin, int32_t end, Visit visit) const {
    const auto step = static_cast<int32_t>(blockDim.x);
    for (int32_t group = begin + static_cast<int32_t>(threadIdx.x); group < end; group += kAtOnce * step) {
      Group groups[kAtOnce];
      uint32_t marks[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        groups[i] = reinterpret_cast<const Group*>(logits)[min(group + i * step, end - 1)];
      }
      if (seen != nullptr) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int32_t first = min(group + i * step, end - 1) * kWidth;  // a group lies within one word
          marks[i] = seen[first / 32] >> (first % 32);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (group + i * step >= end) break;
        float values[kWidth];
        to_values(values, groups[i], marks[i]);
        visit(values, (group + i * step) * kWidth);
      }
    }
  }

 private:
  using Group = std::conditional_t<kWidth == 1, T, FullPack>;

  __device__ __forceinline__ void to_values(float (&values)[kWidth], const Group& group, uint32_t marks) const {
    if constexpr (kWidth == 1) {
      values[0] = to_float(group);
    } else {
      unpack<T>(values, group);
    }
    if (marks == 0) return;  // nearly always
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if ((marks >> i & 1) != 0) values[i] = values[i] > 0.0F ? values[i] / penalty : values[i] * penalty;
    }
  }
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53U, counter.x), low0 = 0xD2511F53U * counter.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57U, counter.z), low1 = 0xCD9E8D57U * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9U;
    key.y += 0xBB67AE85U;
  }
  return counter;
}

// Gumbel noise: the largest of log(p) + noise is a draw from p. It depends on seed, step, sequence and token alone.
struct Noise {
  uint2 seed;
  uint2 step;
  uint32_t sequence;

  __device__ __forceinline__ Noise(const SamplingSettings& settings, int32_t row)
      : seed(bit_cast<uint2>(settings.seed)), step(bit_cast<uint2>(settings.step)), sequence(row) {}

  // Of kWidth tokens from `first` on.
  template <int kWidth>
  __device__ __forceinline__ void get(float (&noise)[kWidth], int32_t first) const {
#pragma unroll
    for (int part = 0; part < (kWidth + 3) / 4; ++part) {
      const uint4 random = philox(make_uint4(first / 4 + part, sequence, step.x, step.y), seed);
      if constexpr (kWidth == 1) {
        const int32_t place = first % 4;
        noise[0] = gumbel(place == 0 ? random.x : place == 1 ? random.y : place == 2 ? random.z : random.w);
      } else {
        noise[4 * part] = gumbel(random.x);
        noise[4 * part + 1] = gumbel(random.y);
        noise[4 * part + 2] = gumbel(random.z);
        noise[4 * part + 3] = gumbel(random.w);
      }
    }
  }

 private:
  static __device__ __forceinline__ float gumbel(uint32_t random) {
    // The exponentially distributed -log(1 - u), to a relative error of a few 1e-6; small ones, which win, from its
    // series.
    const float u = fminf((static_cast<float>(random) + 0.5F) * 0x1p-32F, 1.0F - 0x1p-24F);
    const float series =
        u * fmaf(u, fmaf(u, fmaf(u, fmaf(u, fmaf(u, 1.0F / 6, 1.0F / 5), 1.0F / 4), 1.0F / 3), 1.0F / 2), 1.0F);
    return -__logf(u < 0x1p-4F ? series : -__logf(1.0F - u));
  }
};

__device__ __forceinline__ Choice larger(Choice a, Choice b) { return a > b ? a : b; }

// The largest of all threads', in thread 0. Called by all threads of the block, which are full warps.
__device__ __forceinline__ Choice block_largest(Choice choice) {
  __shared__ Choice of_warps[32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    choice = larger(choice, __shfl_xor_sync(0xffffffffU, choice, distance));
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = choice;
  __syncthreads();
  if (threadIdx.x >= 32) return choice;
  choice = threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    choice = larger(choice, __shfl_xor_sync(0xffffffffU, choice, distance));
  }
  return choice;
}

// Writes the result of a sequence: its last step, by one thread.
__device__ __forceinline__ void finish(const SamplingParams& p, int32_t sequence, Choice choice) {
  const int32_t token = is_finite(choice) ? token_of(choice) : kNoToken;
  p.tokens[sequence] = token;
  if (p.input_ids != nullptr) p.input_ids[sequence] = max(token, 0);
  if (p.past_lengths != nullptr) ++p.past_lengths[sequence];
  if (p.seen != nullptr && token != kNoToken) {
    p.seen[static_cast<int64_t>(sequence) * ((p.vocab_size + 31) / 32) + token / 32] |= 1U << (token % 32);
  }
  if (p.settings == nullptr) return;
  // All blocks that use the step have read it before their sequence is done, and so before the last sequence is.
  auto* finished = reinterpret_cast<unsigned*>(p.semaphores + p.sequences);
  if (atomicInc(finished, p.sequences - 1) == p.sequences - 1) ++p.settings->step;
}

// The largest choice of all blocks of a sequence is its token: the last block to arrive finishes the sequence.
__device__ __forceinline__ void finish_together(const SamplingParams& p, int32_t sequence, int block, int blocks,
                                                Choice choice) {
  __shared__ bool is_last;
  Choice* of_blocks = static_cast<Choice*>(p.workspace) + static_cast<int64_t>(sequence) * blocks;
  choice = block_largest(choice);
  if (blocks > 1) {
    if (threadIdx.x == 0) {
      of_blocks[block] = choice;
      __threadfence();
      // Wraps around to zero for the next launch.
      is_last = atomicInc(reinterpret_cast<unsigned*>(p.semaphores + sequence), blocks - 1) == blocks - 1;
      __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    choice = block_largest(threadIdx.x < blocks ? __ldcg(of_blocks + threadIdx.x) : 0);
  }
  if (threadIdx.x == 0) finish(p, sequence, choice);
}

// The blocks of a cluster (Hopper and later), which share their memory. On other devices a cluster is one block.
struct Cluster {
  static constexpr int kMaxSize = 8;

  static __device__ __forceinline__ int rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
  }
  static __device__ __forceinline__ int size() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
  }
  static __device__ __forceinline__ void sync() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#else
    __syncthreads();
#endif
  }
  // The same variable of another block.
  template <typename T>
  static __device__ __forceinline__ T* of(T* shared, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
    return shared;
#endif
  }

  // Returns the largest choice of all threads of all blocks, in every thread.
  static __device__ __forceinline__ Choice largest(Choice choice) {
    __shared__ Choice of_block;
    choice = block_largest(choice);
    if (threadIdx.x == 0) of_block = choice;
    sync();
    choice = 0;
#pragma unroll
    for (int other = 0; other < kMaxSize; ++other) {
      if (other < size()) choice = larger(choice, *of(&of_block, other));
    }
    sync();
    return choice;
  }
};

}  // namespace qwen_plugins
