// Where top-k and top-p cut off the less likely tokens: exact, by radix selection over the ordered bits of the logits.
//
// Both are one question. Each token has a weight (1 for top-k, its probability for top-p): of the tokens in falling
// order of their logits, which is the first at which the weights so far reach a target? Weights are integers, so that
// their sums do not depend on the order in which threads add them.
#pragma once

#include "kernels.cuh"

namespace qwen_plugins {

constexpr int kCutThreads = 1024;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kCopies = 16;  // of each bin: logits are near each other, and atomic additions to one address serialise

using Weight = unsigned long long;

// Top-k: the k-th token.
struct CountWeights {
  Weight k;
  __device__ __forceinline__ Weight operator()(float) const { return 1; }
  __device__ __forceinline__ Weight target(Weight) const { return k; }
};

// A weight is added in two halves, so that shared memory need not carry from one to the other: a copy of a bin is given
// at most kMaxVocabSize / kCopies weights, whose halves add up to less than 2^32.
constexpr int kHalfBits = 17;
constexpr Weight kMaxWeight = (Weight{1} << 2 * kHalfBits) - 1;
static_assert((Weight{1} << kHalfBits) * (kMaxVocabSize / kCopies) <= Weight{1} << 32);

// Top-p: probabilities, where the likeliest token's is kMaxWeight.
struct ProbabilityWeights {
  float largest;
  float inverse_temperature;
  float top_p;
  __device__ __forceinline__ Weight operator()(float value) const {
    const Weight weight =
        __float2ull_rn(expf((value - largest) * inverse_temperature) * static_cast<float>(kMaxWeight));
    return weight < kMaxWeight ? weight : kMaxWeight;
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
  alignas(16) uint32_t low[kBins][kCopies];  // the halves of sums
  alignas(16) uint32_t high[kBins][kCopies];
  Weight totals[2][kBins];  // of this block, read by the others; digits alternate between the two
  Weight of_warps[kBins / 32];
  Bin found;
};

__device__ __forceinline__ void add_weight(CutMemory& memory, uint32_t bin, Weight weight) {
  const int copy = static_cast<int>(threadIdx.x) % kCopies;
  const uint32_t low = static_cast<uint32_t>(weight) & ((1U << kHalfBits) - 1);
  const auto high = static_cast<uint32_t>(weight >> kHalfBits);
  if (low != 0) atomicAdd(&memory.low[bin][copy], low);
  if (high != 0) atomicAdd(&memory.high[bin][copy], high);
}

__device__ __forceinline__ void clear_bins(CutMemory& memory) {
  constexpr int kPacks = kBins * kCopies / 4;
  for (int i = threadIdx.x; i < kPacks; i += kCutThreads) {
    reinterpret_cast<FullPack*>(memory.low)[i] = FullPack{};
    reinterpret_cast<FullPack*>(memory.high)[i] = FullPack{};
  }
}

// This block's sums of all copies. Four threads have a bin, each four copies of it.
__device__ __forceinline__ void add_copies(CutMemory& memory, Weight (&totals)[kBins]) {
  constexpr int kThreads = kCutThreads / kBins;
  static_assert(kThreads * 4 == kCopies);
  const int bin = threadIdx.x / kThreads, part = threadIdx.x % kThreads;
  const FullPack low = reinterpret_cast<const FullPack*>(memory.low[bin])[part];
  const FullPack high = reinterpret_cast<const FullPack*>(memory.high[bin])[part];
  Weight sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += (static_cast<Weight>(high.words[i]) << kHalfBits) + low.words[i];
#pragma unroll
  for (int distance = 1; distance < kThreads; distance *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, distance);
  if (part == 0) totals[bin] = sum;
}

// Adds up the bins of all blocks, and finds the bin in which the target is reached, going down from the highest.
// `target(total)` is called once the total is known. Every block of the cluster does all of this.
template <typename Target>
__device__ __forceinline__ Bin find_bin(CutMemory& memory, Weight (&totals)[kBins], Target target) {
  const int bin = kBins - 1 - static_cast<int>(threadIdx.x);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Weight own = 0, sum = 0;
  if (bin >= 0) {
#pragma unroll
    for (int other = 0; other < Cluster::kMaxSize; ++other) {
      if (other < Cluster::size()) own += Cluster::of(totals, other)[bin];
    }
    sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const Weight before = __shfl_up_sync(0xffffffffU, sum, distance);
      if (lane >= distance) sum += before;
    }
    if (lane == 31) memory.of_warps[warp] = sum;
  }
  __syncthreads();
  if (bin >= 0) {
    Weight total = 0;
#pragma unroll
    for (int other = 0; other < kBins / 32; ++other) {
      if (other == warp) sum += total;
      total += memory.of_warps[other];
    }
    const Weight wanted = target(total), before = sum - own;
    if (before < wanted && sum >= wanted) memory.found = {static_cast<uint32_t>(bin), own, wanted - before};
  }
  __syncthreads();
  return memory.found;
}

// The leading bits of a choice: those of its logit first, then those of its token, which decides between equal logits.
struct Prefix {
  Choice bits = 0;
  int open = 64;  // bits of the choice that are not known yet

  __device__ __forceinline__ Choice lowest() const { return open == 64 ? 0 : bits << open; }
  __device__ __forceinline__ void append(Choice next, int count) {
    bits = bits << count | next;
    open -= count;
  }
  // Appends the last bits of a logit, which are zeros in every float of its type: ones in a negative logit's ordered
  // bits.
  __device__ __forceinline__ void append_zeros_of_logit() {
    const int count = open - kLogitEnd;
    const bool is_negative = (bits >> (63 - open) & 1) == 0;
    append(is_negative ? (Choice{1} << count) - 1 : 0, count);
  }
  // Appends the first bits of ~token, which are ones for every token.
  __device__ __forceinline__ void append_ones_of_token() {
    constexpr int kTokenBits = 19;
    static_assert(kMaxVocabSize == 1 << kTokenBits);
    append((Choice{1} << (kLogitEnd - kTokenBits)) - 1, kLogitEnd - kTokenBits);
  }

  static constexpr int kLogitEnd = 32;
};

// Adds the weights of the choices with this prefix, from `floor` up, to the bins of their next `digit_bits` bits.
template <typename T, int kWidth, typename Weights>
__device__ __forceinline__ void fill_bins(const Row<T, kWidth>& row, int32_t begin, int32_t end, Choice floor,
                                          const Weights& weights, const Prefix& prefix, int digit_bits,
                                          CutMemory& memory) {
  // Logits that may have the prefix, by 32 bits: after the first digits hardly any.
  const auto lowest = static_cast<uint32_t>(prefix.lowest() >> 32);
  const int unknown = prefix.open - 32;
  const uint32_t span = unknown >= 32 ? 0xffffffffU : unknown <= 0 ? 0 : (1U << unknown) - 1;
  const int shift = prefix.open - digit_bits;
  row.template for_each<3>(begin, end, [&](auto& values, int32_t first) {
#pragma unroll
    for (int i = 0; i < kCountOf<decltype(values)>; ++i) {
      if (ordered_bits(values[i]) - lowest > span) continue;
      const Choice choice = make_choice(values[i], first + i);
      const Choice leading = choice >> shift;
      if (choice >= floor && leading >> digit_bits == prefix.bits) {
        add_weight(memory, leading & ((1U << digit_bits) - 1), weights(values[i]));
      }
    }
  });
}

// The choice at which the weights reach their target; only choices from `floor` up count. Called by all threads of a
// cluster, whose blocks have the groups from `begin` to `end`.
template <typename T, int kWidth, typename Weights>
__device__ __noinline__ Choice find_cut(const Row<T, kWidth>& row, int32_t begin, int32_t end, Choice floor,
                                        const Weights& weights, CutMemory& memory) {
  Prefix prefix;
  Weight remaining = 0;
  for (int digit = 0; prefix.open > 0; ++digit) {
    const int digit_bits = min(kDigitBits, prefix.open);
    clear_bins(memory);
    __syncthreads();
    fill_bins(row, begin, end, floor, weights, prefix, digit_bits, memory);
    __syncthreads();
    auto& totals = memory.totals[digit % 2];
    add_copies(memory, totals);
    Cluster::sync();
    const Bin found =
        find_bin(memory, totals, [&](Weight sum) { return digit == 0 ? weights.target(sum) : remaining; });
    remaining = found.remaining;
    prefix.append(found.index, digit_bits);
    if (remaining == found.total) break;  // all tokens of this bin stay
    if (prefix.open > Prefix::kLogitEnd && prefix.open <= Prefix::kLogitEnd + row.zero_bits()) {
      prefix.append_zeros_of_logit();
    }
    if (prefix.open == Prefix::kLogitEnd) {
      // The tokens of this bin have one logit, and one weight: all of them stay, if the last one does.
      if (remaining > found.total - weights(score_of(prefix.lowest()))) break;
      prefix.append_ones_of_token();
    }
  }
  Cluster::sync();                     // no other block reads this block's memory any more
  return max(floor, prefix.lowest());  // the lowest choice with the prefix may be below `floor`
}

}  // namespace qwen_plugins
