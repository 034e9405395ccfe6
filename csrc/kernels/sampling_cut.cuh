// Where top-k and top-p cut off the less likely tokens: exact, by radix selection over the ordered bits of the logits.
//
// Both are one question. Each token has a weight (1 for top-k, its probability for top-p): of the tokens in falling
// order of their logits, which is the first at which the weights so far reach a target? Weights are integers, so that
// their sums do not depend on the order in which threads add them.
#pragma once

#include "sampling_kernels.cuh"

namespace qwen_plugins {

constexpr int kCutThreads = 1024;
constexpr int kBins = 2048;

using Weight = unsigned long long;

// Top-k: the k-th token.
struct CountWeights {
  Weight k;
  __device__ __forceinline__ Weight operator()(float) const { return 1; }
  __device__ __forceinline__ Weight target(Weight) const { return k; }
};

// Top-p: probabilities relative to the likeliest token's, in units of 2^-40: kMaxVocabSize of them fit in 64 bits.
struct ProbabilityWeights {
  float largest;
  float inverse_temperature;
  float top_p;
  __device__ __forceinline__ Weight operator()(float value) const {
    if (value == largest) return 1ULL << 40;  // infinities too
    return __float2ull_rn(expf((value - largest) * inverse_temperature) * 0x1p40F);
  }
  __device__ __forceinline__ Weight target(Weight total) const {
    const auto reached = static_cast<Weight>(ceil(static_cast<double>(total) * top_p));
    return reached < 1 ? 1 : reached < total ? reached : total;
  }
};

struct Bin {
  uint32_t index;
  Weight total;      // of the words in this bin
  Weight remaining;  // of the target, when the words in higher bins are taken
};

struct CutMemory {
  alignas(16) Weight bins[kBins];
  Weight of_warps[kCutThreads / 32];
  Bin found;
};

// Shared memory adds 32 bits at a time without a loop; the carry is this thread's if it sees the sum wrap around.
__device__ __forceinline__ void add_weight(Weight* bin, Weight weight) {
  auto* halves = reinterpret_cast<uint32_t*>(bin);
  const auto low = static_cast<uint32_t>(weight);
  uint32_t high = static_cast<uint32_t>(weight >> 32);
  if (low != 0) high += atomicAdd(halves, low) > ~low ? 1 : 0;
  if (high != 0) atomicAdd(halves + 1, high);
}

// The sum of this thread's weight and those of the threads before it; `total`: of all.
__device__ __forceinline__ Weight inclusive_sum(Weight weight, Weight* of_warps, Weight* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Weight other = __shfl_up_sync(0xffffffffU, weight, distance);
    if (lane >= distance) weight += other;
  }
  if (lane == 31) of_warps[warp] = weight;
  __syncthreads();
  Weight before = 0, sum = 0;
#pragma unroll
  for (int other = 0; other < kCutThreads / 32; ++other) {
    if (other == warp) before = sum;
    sum += of_warps[other];
  }
  *total = sum;
  return before + weight;
}

// By the cluster's first block: adds up the bins of all blocks and tells them in which one the target is reached, going
// down from the highest. `target(total)` is asked for once the total is known.
template <typename Target>
__device__ __forceinline__ void find_bin(CutMemory& memory, Target target) {
  constexpr int kOfThread = kBins / kCutThreads;
  static_assert(kOfThread == 2);
  const int low_bin = kBins - kOfThread * (static_cast<int>(threadIdx.x) + 1);
  Weight high = 0, low = 0;
  for (int other = 0; other < Cluster::size(); ++other) {
    const auto pair = *reinterpret_cast<const ulonglong2*>(Cluster::of(memory.bins, other) + low_bin);
    low += pair.x;
    high += pair.y;
  }
  Weight total;
  const Weight sum = inclusive_sum(high + low, memory.of_warps, &total);
  const Weight before = sum - high - low;
  const Weight wanted = target(total);
  if (before >= wanted || sum < wanted) return;
  const bool is_high = before + high >= wanted;
  const Bin found = is_high ? Bin{static_cast<uint32_t>(low_bin + 1), high, wanted - before}
                            : Bin{static_cast<uint32_t>(low_bin), low, wanted - before - high};
  for (int other = 0; other < Cluster::size(); ++other) *Cluster::of(&memory.found, other) = found;
}

// Digits of a Choice from its highest bits down: three of the logit, three of the token (which decides between equals).
__device__ __forceinline__ int digit_bits(int digit) { return digit % 3 == 2 ? 10 : 11; }

// The choice at which the weights reach their target; only choices from `floor` up count. Called by all threads of a
// cluster, whose blocks have the groups from `begin` to `end`.
template <typename T, int kWidth, typename Weights>
__device__ __noinline__ Choice find_cut(const Row<T, kWidth>& row, int32_t begin, int32_t end, Choice floor,
                                        const Weights& weights, CutMemory& memory) {
  Choice prefix = 0;
  Weight remaining = 0;
  int shift = 64;
  for (int digit = 0; digit < 6; ++digit) {
    const int bits = digit_bits(digit);
    shift -= bits;
    for (int bin = threadIdx.x; bin < kBins; bin += kCutThreads) memory.bins[bin] = 0;
    __syncthreads();
    for (int32_t group = begin + static_cast<int32_t>(threadIdx.x); group < end; group += kCutThreads) {
      float values[kWidth];
      row.load(values, group);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const Choice choice = make_choice(values[i], group * kWidth + i);
        const Choice leading = choice >> shift;
        if (choice < floor || leading >> bits != prefix || group * kWidth + i >= row.vocab_size) continue;
        add_weight(&memory.bins[leading & ((1U << bits) - 1)], weights(values[i]));
      }
    }
    Cluster::sync();
    if (Cluster::rank() == 0) {
      find_bin(memory, [&](Weight total) { return digit == 0 ? weights.target(total) : remaining; });
    }
    Cluster::sync();
    const Bin found = memory.found;
    remaining = found.remaining;
    prefix = prefix << bits | found.index;
    if (remaining == found.total) break;  // all of this bin
    // Past the logit's digits all that is left has the same one, and the same weight: all of it, if even the last
    // counts.
    if (shift == 32 && remaining > found.total - weights(score_of(prefix << 32))) break;
  }
  return prefix << shift;
}

}  // namespace qwen_plugins
