#include "clusters.h"
#include "cut.cuh"
#include "kernels.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "sampling.h"

namespace qwen_plugins {
namespace {

constexpr float kNan = __builtin_nanf("");

// Probabilities are added as integers, so that their sum does not depend on how many blocks share a sequence: in units
// of 2^-44 of the likeliest token's.
constexpr float kUnits = 0x1p44F;
static_assert(uint64_t{kMaxVocabSize} << 44 <= uint64_t{1} << 63);

struct BestMemory {
  Choice choices[kMaxBest];
  int count;
};

// The most likely tokens, in no order, into the memory of the cluster's first block.
template <typename T, int kWidth>
__device__ __forceinline__ void collect_best(const Row<T, kWidth>& row, Range range, int32_t count, BestMemory& best) {
  __shared__ CutMemory memory;
  const Choice floor = find_cut(row, range.begin, range.end, 0, CountWeights{static_cast<Weight>(count)}, memory);
  BestMemory& first = *Cluster::of(&best, 0);
  row.template for_each_as_it_is<2>(range.begin, range.end, [&](auto& values, int32_t token) {
#pragma unroll
    for (int i = 0; i < kCountOf<decltype(values)>; ++i) {
      if (ordered_bits(values[i]) < static_cast<uint32_t>(floor >> 32)) continue;
      const Choice choice = make_choice(values[i], token + i);
      if (choice >= floor) first.choices[atomicAdd(&first.count, 1)] = choice;
    }
  });
  Cluster::sync();
}

// Puts the best in order: each of the first threads has one, whose place is the number of better ones.
__device__ __forceinline__ void write_best(const LogprobsParams& p, int32_t sequence, const BestMemory& best,
                                           float largest, float log_sum) {
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread >= p.num_best) return;
  int place = thread;
  int32_t token = kNoToken;
  float logprob = -INFINITY;
  if (thread < best.count) {
    const Choice own = best.choices[thread];
    place = 0;
    for (int i = 0; i < best.count; ++i) place += best.choices[i] > own ? 1 : 0;
    token = token_of(own);
    logprob = (score_of(own) - largest) - log_sum;
  }
  p.best_tokens[static_cast<int64_t>(sequence) * p.num_best + place] = token;
  p.best_logprobs[static_cast<int64_t>(sequence) * p.num_best + place] = logprob;
}

// A cluster has a sequence.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kCutThreads, 1) logprobs(const __grid_constant__ LogprobsParams p) {
  __shared__ BestMemory best;
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int32_t sequence = static_cast<int32_t>(blockIdx.x) / Cluster::size();
  const bool is_first = Cluster::rank() == 0;
  const auto thread = static_cast<int>(threadIdx.x);
  const Row<T, kWidth> row(p.logits, p.logits_row_stride, sequence, p.vocab_size);
  const Range range = share_of(Cluster::rank(), Cluster::size(), row.groups());
  if (thread == 0) best.count = 0;  // seen by all blocks after the next call
  const Choice likeliest = Cluster::largest(best_of<true>(row, range));
  if (!is_finite(likeliest)) {
    if (!is_first) return;
    if (thread == 0) p.logprobs[sequence] = kNan;
    if (thread >= p.num_best) return;
    p.best_tokens[static_cast<int64_t>(sequence) * p.num_best + thread] = kNoToken;
    p.best_logprobs[static_cast<int64_t>(sequence) * p.num_best + thread] = kNan;
    return;
  }
  const float largest = score_of(likeliest);
  Weight sum = 0;
  row.template for_each<4>(range.begin, range.end, [&](auto& values, int32_t) {
#pragma unroll
    for (int i = 0; i < kCountOf<decltype(values)>; ++i) sum += __float2ull_rn(expf(values[i] - largest) * kUnits);
  });
  const float log_sum = logf(static_cast<float>(Cluster::sum(sum)) / kUnits);
  if (is_first && thread == 0) {
    const int32_t token = p.tokens[sequence];
    const bool known = token >= 0 && token < p.vocab_size;
    p.logprobs[sequence] = known ? (to_float(row.logits[token]) - largest) - log_sum : kNan;
  }
  if (p.num_best == 0) return;
  collect_best(row, range, min(p.num_best, p.vocab_size), best);
  if (is_first) write_best(p, sequence, best, largest, log_sum);
}

template <typename T, int kWidth>
cudaError_t launch_in_groups(const LogprobsParams& p, cudaStream_t stream) {
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  const int cluster = cluster_size(p.sequences, p.vocab_size / kWidth, device);
  const dim3 blocks(static_cast<unsigned>(cluster) * p.sequences);
  return launch_clusters(logprobs<T, kWidth>, blocks, dim3(kCutThreads), 0, cluster, device, stream, p);
}

template <typename T>
cudaError_t launch(const LogprobsParams& p, cudaStream_t stream) {
  return in_packs<T>(p) ? launch_in_groups<T, kVec<T>>(p, stream) : launch_in_groups<T, 1>(p, stream);
}

}  // namespace

cudaError_t launch_logprobs(const LogprobsParams& p, cudaStream_t stream) {
  constexpr int32_t kMaxSequences = 1 << 20;
  if (p.sequences < 0 || p.sequences > kMaxSequences || p.vocab_size <= 0 || p.vocab_size > kMaxVocabSize ||
      p.logits_row_stride < 0 || p.num_best < 0 || p.num_best > kMaxBest) {
    return cudaErrorInvalidValue;
  }
  if (p.sequences == 0) return cudaSuccess;
  if (p.logits == nullptr || p.tokens == nullptr || p.logprobs == nullptr ||
      (p.num_best > 0 && (p.best_tokens == nullptr || p.best_logprobs == nullptr))) {
    return cudaErrorInvalidValue;
  }
  return with_type(p.dtype, [&](auto zero) { return launch<decltype(zero)>(p, stream); });
}

}  // namespace qwen_plugins
