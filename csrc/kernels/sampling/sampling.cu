#include <algorithm>

#include "clusters.h"
#include "cut.cuh"
#include "kernels.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "sampling.h"

namespace qwen_plugins {
namespace {

constexpr int kArgmaxThreads = 256;
constexpr int kMaxBlocks = 256;  // of one sequence; the last to arrive reads each block's choice with one thread
constexpr float kSmallestTemperature = 1e-30F;
// Below this temperature the scaled logits are so large that adding noise rounds it away, unless the largest logit is
// subtracted first, which takes another pass to find it.
constexpr float kSmallestTemperatureInOnePass = 0x1p-6F;

// The largest logit.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kArgmaxThreads) argmax(const __grid_constant__ SamplingParams p, int blocks) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int sequence = static_cast<int>(blockIdx.x) / blocks, block = static_cast<int>(blockIdx.x) % blocks;
  const Row<T, kWidth> row(p.logits, p.logits_row_stride, sequence, p.vocab_size);
  finish_together(p, sequence, block, blocks, best_of<true>(row, share_of(block, blocks, row.groups())));
}

// A draw among the tokens that top-k, top-p and min-p leave, by one cluster.
template <typename T, int kWidth>
__device__ __forceinline__ void draw_filtered(const SamplingParams& p, const SamplingSettings& settings, int sequence,
                                              const Row<T, kWidth>& row, float inverse_temperature) {
  __shared__ CutMemory memory;
  const Range range = share_of(Cluster::rank(), Cluster::size(), row.groups());
  const Choice likeliest = Cluster::largest(best_of(row, range));
  if (!is_finite(likeliest)) {  // from here on logits are finite or -infinity
    if (Cluster::rank() == 0 && threadIdx.x == 0) finish(p, sequence, likeliest);
    return;
  }
  const float largest = score_of(likeliest);
  Choice floor = 0;
  if (settings.top_k > 0 && settings.top_k < p.vocab_size) {
    const CountWeights weights{static_cast<Weight>(settings.top_k)};
    floor = find_cut(row, range.begin, range.end, floor, weights, memory);
  }
  if (settings.top_p < 1.0F) {
    const ProbabilityWeights weights{largest, inverse_temperature, settings.top_p};
    floor = find_cut(row, range.begin, range.end, floor, weights, memory);
  }
  const float least = logf(settings.min_p);  // of a logit relative to the largest; -infinity for 0
  const Noise noise(settings);
  Choice best = 0;
  row.template for_each<2>(range.begin, range.end, [&](auto& values, int32_t first) {
    constexpr int kCount = kCountOf<decltype(values)>;
    uint32_t allowed = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (ordered_bits(values[i]) < static_cast<uint32_t>(floor >> 32)) continue;
      if ((values[i] - largest) * inverse_temperature < least) continue;
      allowed |= make_choice(values[i], first + i) >= floor ? 1U << i : 0;
    }
    if (allowed == 0) return;
    float added[kCount];
    noise.get(added, first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float score = fmaf(values[i] - largest, inverse_temperature, added[i]);
      if ((allowed >> i & 1) != 0) best = larger(best, make_choice(score, first + i));
    }
  });
  best = Cluster::largest(best);
  if (Cluster::rank() == 0 && threadIdx.x == 0) finish(p, sequence, best);
}

// A choice by the settings of a slot, which are in device memory. If there is nothing to cut off, and the temperature
// is not too low for one pass, all blocks take part and read the logits once; otherwise the first cluster draws alone.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kCutThreads, 1) sample(const __grid_constant__ SamplingParams p, int blocks) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int sequence = static_cast<int>(blockIdx.x) / blocks, block = static_cast<int>(blockIdx.x) % blocks;
  const int32_t slot = slot_of(p, sequence);
  const SamplingSettings settings = p.state.settings[slot];
  Row<T, kWidth> row(p.logits, p.logits_row_stride, sequence, p.vocab_size);
  row.process(p, slot);
  const Range range = share_of(block, blocks, row.groups());
  if (settings.greedy != 0) {
    finish_together(p, sequence, block, blocks, best_of(row, range));
    return;
  }
  const float inverse_temperature = 1.0F / fmaxf(settings.temperature, kSmallestTemperature);
  const bool filtered = (settings.top_k > 0 && settings.top_k < p.vocab_size) || settings.top_p < 1.0F ||
                        settings.min_p > 0.0F || settings.temperature < kSmallestTemperatureInOnePass;
  if (filtered) {
    if (block < Cluster::size()) draw_filtered(p, settings, sequence, row, inverse_temperature);
    return;
  }
  const Noise noise(settings);
  const auto add_noise = [&](auto& values, int32_t first) {
    constexpr int kCount = kCountOf<decltype(values)>;
    float added[kCount];
    noise.get(added, first);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = values[i] * inverse_temperature + added[i];
  };
  finish_together(p, sequence, block, blocks, best_of(row, range, add_noise));
}

struct Grid {
  int threads, blocks, cluster;  // blocks of a sequence, and how many of them are a cluster
};

Grid argmax_grid(const SamplingParams& p, int groups, const DeviceProperties& device) {
  const int wanted = (groups + kArgmaxThreads - 1) / kArgmaxThreads;
  return {kArgmaxThreads, std::clamp(4 * device.multiprocessors / p.sequences, 1, std::min(wanted, kMaxBlocks)), 1};
}

Grid sample_grid(const SamplingParams& p, int groups, const DeviceProperties& device) {
  constexpr int kFewestGroups = 128;  // that are worth a block: work for four warps
  const int cluster = cluster_size(p.sequences, groups, device);
  // A block has a multiprocessor for itself. Only three quarters of them are used, since not every multiprocessor has
  // seven free neighbours for a cluster.
  const int wanted = std::min((groups + kFewestGroups - 1) / kFewestGroups, kMaxBlocks);
  const int blocks = std::min(device.multiprocessors * 3 / 4 / p.sequences, wanted);
  return {kCutThreads, std::max(blocks / cluster, 1) * cluster, cluster};
}

cudaError_t launch_on_grid(void (*kernel)(SamplingParams, int), const SamplingParams& p, const Grid& grid,
                           const DeviceProperties& device, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks) * p.sequences);
  return launch_clusters(kernel, blocks, dim3(grid.threads), 0, grid.cluster, device, stream, p, grid.blocks);
}

template <typename T, int kWidth>
cudaError_t launch_in_groups(const SamplingParams& p, cudaStream_t stream) {
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  const int groups = p.vocab_size / kWidth;
  if (p.largest) {
    return launch_on_grid(argmax<T, kWidth>, p, argmax_grid(p, groups, device), device, stream);
  }
  return launch_on_grid(sample<T, kWidth>, p, sample_grid(p, groups, device), device, stream);
}

template <typename T>
cudaError_t launch(const SamplingParams& p, cudaStream_t stream) {
  return in_packs<T>(p) ? launch_in_groups<T, kVec<T>>(p, stream) : launch_in_groups<T, 1>(p, stream);
}

}  // namespace

cudaError_t sampling_workspace_bytes(int32_t max_sequences, int32_t vocab_size, int64_t* bytes) {
  if (max_sequences < 0 || vocab_size <= 0 || vocab_size > kMaxVocabSize || bytes == nullptr) {
    return cudaErrorInvalidValue;
  }
  *bytes = static_cast<int64_t>(max_sequences) * kMaxBlocks * static_cast<int64_t>(sizeof(Choice));
  return cudaSuccess;
}

cudaError_t launch_sampling(const SamplingParams& p, cudaStream_t stream) {
  constexpr int32_t kMaxSequences = 1 << 20;  // the grid has a few blocks of each
  if (p.sequences < 0 || p.sequences > kMaxSequences || p.vocab_size <= 0 || p.vocab_size > kMaxVocabSize ||
      p.logits_row_stride < 0) {
    return cudaErrorInvalidValue;
  }
  if (p.sequences == 0) return cudaSuccess;
  if (p.logits == nullptr || p.tokens == nullptr || p.workspace == nullptr || p.semaphores == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (!p.largest && (p.state.settings == nullptr || p.state.biases == nullptr || p.state.marks == nullptr ||
                     (p.mask_rows == nullptr) != (p.masks == nullptr))) {
    return cudaErrorInvalidValue;
  }
  return with_type(p.dtype, [&](auto zero) { return launch<decltype(zero)>(p, stream); });
}

}  // namespace qwen_plugins
