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

constexpr uint32_t kInPrompt = 1U << 15;  // of a count
constexpr uint32_t kMostCounted = kInPrompt - 1;

// The words of a bit for each token.
__host__ __device__ __forceinline__ int32_t words_of(int32_t vocab_size) { return (vocab_size + 31) / 32; }

// What biases and penalties make of the logits of the few tokens with a mark.
struct Processing {
  const uint16_t* counts;  // null: no penalties
  const SamplingBias* biases;
  int32_t num_biases;
  float repetition_penalty, presence_penalty, frequency_penalty;

  __device__ __forceinline__ Processing(const SamplingSettings& settings, const SamplingBias* biases_of_slot)
      : counts(settings.counts),
        biases(biases_of_slot),
        num_biases(settings.num_biases),
        repetition_penalty(settings.repetition_penalty),
        presence_penalty(settings.presence_penalty),
        frequency_penalty(settings.frequency_penalty) {}

  __device__ __forceinline__ float operator()(float value, int32_t token) const {
    const uint32_t count = counts == nullptr ? 0 : counts[token];
    value += bias_of(token);
    if (count == 0) return value;
    value = value > 0.0F ? value / repetition_penalty : value * repetition_penalty;
    const uint32_t in_output = count & kMostCounted;
    value -= frequency_penalty * static_cast<float>(in_output);
    return in_output > 0 ? value - presence_penalty : value;
  }

 private:
  __device__ __forceinline__ float bias_of(int32_t token) const {
    if (num_biases == 0) return 0.0F;
    int32_t place = 0;
    for (int32_t left = num_biases; left > 1; left -= left / 2) {
      if (biases[place + left / 2].token <= token) place += left / 2;
    }
    return biases[place].token == token ? biases[place].value : 0.0F;
  }
};

// The logits of a sequence, in groups of kWidth: full packs or single ones.
template <typename T, int kWidth>
struct Row {
  const T* logits;
  int32_t vocab_size;               // a multiple of kWidth
  const uint32_t* marks = nullptr;  // null: neither biases nor penalties
  const uint32_t* mask = nullptr;   // null: all tokens are allowed
  const SamplingSettings* settings = nullptr;
  const SamplingBias* biases = nullptr;

  // The logits as they are.
  __device__ __forceinline__ Row(const void* matrix, int64_t row_stride, int32_t row, int32_t size)
      : logits(static_cast<const T*>(matrix) + row * row_stride), vocab_size(size) {}

  // With what the state of a slot makes of them.
  __device__ __forceinline__ void process(const SamplingParams& p, int32_t slot) {
    settings = p.state.settings + slot;
    biases = p.state.biases + static_cast<int64_t>(slot) * kMaxBiases;
    if (settings->num_biases > 0 || settings->counts != nullptr) {
      marks = p.state.marks + static_cast<int64_t>(slot) * words_of(vocab_size);
    }
    const int32_t mask_row = p.mask_rows == nullptr ? -1 : p.mask_rows[slot];
    if (mask_row >= 0) mask = p.masks + static_cast<int64_t>(mask_row) * words_of(vocab_size);
  }

  __device__ __forceinline__ int32_t groups() const { return vocab_size / kWidth; }

  // Low bits that are zeros in all logits, as floats.
  __device__ __forceinline__ int zero_bits() const {
    if (marks != nullptr || std::is_same_v<T, float>) return 0;
    return std::is_same_v<T, __half> ? 13 : 16;
  }

  // Calls visit(values, first token) for this thread's part of the groups from `begin` to `end`: logits after biases,
  // penalties and mask, kWidth or one at a time. Tokens with a mark come after the groups, in which they are -infinity
  // like those that are not allowed. A few groups are loaded before the first is used.
  template <int kAtOnce, typename Visit>
  __device__ __forceinline__ void for_each(int32_t begin, int32_t end, Visit visit) const {
    const auto step = static_cast<int32_t>(blockDim.x);
    for (int32_t group = begin + static_cast<int32_t>(threadIdx.x); group < end; group += kAtOnce * step) {
      Group groups[kAtOnce];
      uint32_t left_out[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        groups[i] = reinterpret_cast<const Group*>(logits)[min(group + i * step, end - 1)];
      }
      const auto bits_of = [&](const uint32_t* words, int i) {
        const int32_t first = min(group + i * step, end - 1) * kWidth;  // a group lies within one word
        return words[first / 32] >> (first % 32);
      };
      if (marks != nullptr) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) left_out[i] = bits_of(marks, i);
      }
      if (mask != nullptr) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) left_out[i] |= ~bits_of(mask, i);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (group + i * step >= end) break;
        float values[kWidth];
        to_values(values, groups[i]);
        leave_out(values, left_out[i]);
        visit(values, (group + i * step) * kWidth);
      }
    }
    if (marks != nullptr) for_each_marked(begin * kWidth, end * kWidth, visit);
  }

  // The same for logits as they are, with neither marks nor a mask. There the compiler moves loads behind the
  // conditions of their visits, where one after the other is waited for: as long as there are kAtOnce groups, none is
  // conditional.
  template <int kAtOnce, typename Visit>
  __device__ __forceinline__ void for_each_as_it_is(int32_t begin, int32_t end, Visit visit) const {
    const auto step = static_cast<int32_t>(blockDim.x);
    int32_t group = begin + static_cast<int32_t>(threadIdx.x);
    for (; group + (kAtOnce - 1) * step < end; group += kAtOnce * step) visit_groups<kAtOnce>(group, step, visit);
    for (; group < end; group += step) visit_groups<1>(group, step, visit);
  }

 private:
  using Group = std::conditional_t<kWidth == 1, T, FullPack>;

  template <int kCount, typename Visit>
  __device__ __forceinline__ void visit_groups(int32_t first, int32_t step, Visit& visit) const {
    Group groups[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) groups[i] = reinterpret_cast<const Group*>(logits)[first + i * step];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float values[kWidth];
      to_values(values, groups[i]);
      visit(values, (first + i * step) * kWidth);
    }
  }

  static __device__ __forceinline__ void to_values(float (&values)[kWidth], const Group& group) {
    if constexpr (kWidth == 1) {
      values[0] = to_float(group);
    } else {
      unpack<T>(values, group);
    }
  }

  // NaN and +infinity stay, for which the row gets no token.
  static __device__ __forceinline__ void leave_out(float (&values)[kWidth], uint32_t bits) {
    if ((bits & ((1U << kWidth) - 1)) == 0) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if ((bits >> i & 1) != 0 && values[i] < INFINITY) values[i] = -INFINITY;
    }
  }

  // Visits this thread's part of the tokens from `begin` to `end` that have a mark and are allowed.
  template <typename Visit>
  __device__ __forceinline__ void for_each_marked(int32_t begin, int32_t end, Visit visit) const {
    const Processing process(*settings, biases);
    for (int32_t word = begin / 32 + static_cast<int32_t>(threadIdx.x); word * 32 < end; word += blockDim.x) {
      uint32_t bits = marks[word];
      if (mask != nullptr) bits &= mask[word];
      while (bits != 0) {
        const int32_t token = word * 32 + __ffs(static_cast<int>(bits)) - 1;
        bits &= bits - 1;
        if (token < begin || token >= end) continue;
        float values[1] = {process(to_float(logits[token]), token)};
        visit(values, token);
      }
    }
  }
};

// A part of a row's groups.
struct Range {
  int32_t begin, end;
};
__device__ __forceinline__ Range share_of(int part, int parts, int32_t groups) {
  const int32_t size = (groups + parts - 1) / parts;
  return {min(part * size, groups), min((part + 1) * size, groups)};
}

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

// Gumbel noise: the largest of log(p) + noise is a draw from p. It depends on seed, stream, step and token alone.
struct Noise {
  uint2 seed;
  uint2 step;
  uint32_t stream;

  __device__ __forceinline__ explicit Noise(const SamplingSettings& settings)
      : seed(bit_cast<uint2>(settings.seed)), step(bit_cast<uint2>(settings.step)), stream(settings.draw_stream) {}

  // Of kWidth tokens from `first` on.
  template <int kWidth>
  __device__ __forceinline__ void get(float (&noise)[kWidth], int32_t first) const {
#pragma unroll
    for (int part = 0; part < (kWidth + 3) / 4; ++part) {
      const uint4 random = philox(make_uint4(first / 4 + part, stream, step.x, step.y), seed);
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

// How many logits a visitor of Row::for_each is given.
template <typename Values>
constexpr int kCountOf = std::extent_v<std::remove_reference_t<Values>>;

// The best choice among this thread's groups, NaN before all others; `score(values, first)` turns logits into scores.
// kAsItIs: the row has neither marks nor a mask.
template <bool kAsItIs = false, typename T, int kWidth, typename Score>
__device__ __forceinline__ Choice best_of(const Row<T, kWidth>& row, Range range, Score score) {
  Choice best = 0;
  const auto visit = [&](auto& values, int32_t first) {
    constexpr int kCount = kCountOf<decltype(values)>;
    score(values, first);
    float largest = values[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = max_or_nan(largest, values[i]);
    int32_t place = kCount - 1;
#pragma unroll
    for (int i = kCount - 2; i >= 0; --i) {
      if (values[i] == largest) place = i;
    }
    best = larger(best, make_choice(largest, first + place));
  };
  if constexpr (kAsItIs) {
    row.template for_each_as_it_is<4>(range.begin, range.end, visit);
  } else {
    row.template for_each<4>(range.begin, range.end, visit);
  }
  return best;
}
template <bool kAsItIs = false, typename T, int kWidth>
__device__ __forceinline__ Choice best_of(const Row<T, kWidth>& row, Range range) {
  return best_of<kAsItIs>(row, range, [](auto&, int32_t) {});
}

__device__ __forceinline__ int32_t slot_of(const SamplingParams& p, int32_t sequence) {
  return p.slots == nullptr ? sequence : p.slots[sequence];
}

// Writes the result of a sequence: its last step, by one thread. All blocks have read the state that it changes.
__device__ __forceinline__ void finish(const SamplingParams& p, int32_t sequence, Choice choice) {
  const int32_t token = is_finite(choice) ? token_of(choice) : kNoToken;
  const int32_t slot = slot_of(p, sequence);
  p.tokens[sequence] = token;
  if (p.last_tokens != nullptr) p.last_tokens[slot] = max(token, 0);
  if (p.past_lengths != nullptr) ++p.past_lengths[sequence];
  if (p.largest) return;
  SamplingSettings& settings = p.state.settings[slot];
  ++settings.step;
  if (settings.counts == nullptr || token == kNoToken) return;
  p.state.marks[static_cast<int64_t>(slot) * words_of(p.vocab_size) + token / 32] |= 1U << (token % 32);
  const uint32_t count = settings.counts[token];
  if ((count & kMostCounted) != kMostCounted) settings.counts[token] = static_cast<uint16_t>(count + 1);
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

  // Returns the sum of all threads' values of all blocks, in every thread.
  static __device__ __forceinline__ unsigned long long sum(unsigned long long value) {
    __shared__ unsigned long long of_block;
    if (threadIdx.x == 0) of_block = 0;
    __syncthreads();
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffU, value, distance);
    if (threadIdx.x % 32 == 0) atomicAdd(&of_block, value);
    sync();
    value = 0;
#pragma unroll
    for (int other = 0; other < kMaxSize; ++other) {
      if (other < size()) value += *of(&of_block, other);
    }
    sync();
    return value;
  }
};

}  // namespace qwen_plugins
