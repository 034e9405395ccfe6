#include <algorithm>

#include "cut.cuh"
#include "kernels.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "sampling.h"

namespace qwen_plugins {
namespace {

constexpr int kArgmaxThreads = 256;
constexpr int kMarkThreads = 256;
constexpr int kMaxBlocks = 256;  // of one sequence; the last to arrive reads each block's choice with one thread
constexpr float kSmallestTemperature = 1e-30F;
// Below this temperature the scaled logits are so large that adding noise rounds it away, unless the largest logit is
// subtracted first, which takes another pass to find it.
constexpr float kSmallestTemperatureInOnePass = 0x1p-6F;

struct Range {
  int32_t begin, end;
};
__device__ __forceinline__ Range share_of(int part, int parts, int32_t groups) {
  const int32_t size = (groups + parts - 1) / parts;
  return {min(part * size, groups), min((part + 1) * size, groups)};
}

// The best choice among this thread's groups, NaN before all others; `score(values, first)` turns logits into scores.
template <typename T, int kWidth, typename Score>
__device__ __forceinline__ Choice best_of(const Row<T, kWidth>& row, Range range, Score score) {
  Choice best = 0;
  row.template for_each<4>(range.begin, range.end, [&](float (&values)[kWidth], int32_t first) {
    score(values, first);
    float largest = values[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) largest = max_or_nan(largest, values[i]);
    int32_t place = kWidth - 1;
#pragma unroll
    for (int i = kWidth - 2; i >= 0; --i) {
      if (values[i] == largest) place = i;
    }
    best = larger(best, make_choice(largest, first + place));
  });
  return best;
}

// The largest logit.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kArgmaxThreads) argmax(const __grid_constant__ SamplingParams p, int blocks) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int sequence = static_cast<int>(blockIdx.x) / blocks, block = static_cast<int>(blockIdx.x) % blocks;
  const Row<T, kWidth> row(p, sequence, p.settings == nullptr ? 1.0F : p.settings->repetition_penalty);
  const Choice best = best_of(row, share_of(block, blocks, row.groups()), [](float (&)[kWidth], int32_t) {});
  finish_together(p, sequence, block, blocks, best);
}

// A draw among the tokens that top-k and top-p leave, by one cluster.
template <typename T, int kWidth>
__device__ __forceinline__ void draw_filtered(const SamplingParams& p, const SamplingSettings& settings, int sequence,
                                              const Row<T, kWidth>& row, float inverse_temperature) {
  __shared__ CutMemory memory;
  const Range range = share_of(Cluster::rank(), Cluster::size(), row.groups());
  const Choice likeliest = Cluster::largest(best_of(row, range, [](float (&)[kWidth], int32_t) {}));
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
  const Noise noise(settings, sequence);
  Choice best = 0;
  row.template for_each<2>(range.begin, range.end, [&](float (&values)[kWidth], int32_t first) {
    uint32_t allowed = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (ordered_bits(values[i]) < static_cast<uint32_t>(floor >> 32)) continue;
      allowed |= make_choice(values[i], first + i) >= floor ? 1U << i : 0;
    }
    if (allowed == 0) return;
    float added[kWidth];
    noise.get(added, first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float score = fmaf(values[i] - largest, inverse_temperature, added[i]);
      if ((allowed >> i & 1) != 0) best = larger(best, make_choice(score, first + i));
    }
  });
  best = Cluster::largest(best);
  if (Cluster::rank() == 0 && threadIdx.x == 0) finish(p, sequence, best);
}

// A draw. The settings, which are in device memory, say whether there is anything to cut off, or the temperature is
// too low for one pass: if not, all blocks take part and read the logits once; otherwise the first cluster draws alone.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kCutThreads, 1) sample(const __grid_constant__ SamplingParams p, int blocks) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int sequence = static_cast<int>(blockIdx.x) / blocks, block = static_cast<int>(blockIdx.x) % blocks;
  const SamplingSettings settings = *p.settings;
  const Row<T, kWidth> row(p, sequence, settings.repetition_penalty);
  const float inverse_temperature = 1.0F / fmaxf(settings.temperature, kSmallestTemperature);
  const bool filtered = (settings.top_k > 0 && settings.top_k < p.vocab_size) || settings.top_p < 1.0F ||
                        settings.temperature < kSmallestTemperatureInOnePass;
  if (filtered) {
    if (block < Cluster::size()) draw_filtered(p, settings, sequence, row, inverse_temperature);
    return;
  }
  const Noise noise(settings, sequence);
  const auto add_noise = [&](float (&values)[kWidth], int32_t first) {
    float added[kWidth];
    noise.get(added, first);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = values[i] * inverse_temperature + added[i];
  };
  finish_together(p, sequence, block, blocks, best_of(row, share_of(block, blocks, row.groups()), add_noise));
}

__global__ void __launch_bounds__(kMarkThreads) mark_seen(const __grid_constant__ MarkSeenParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  uint32_t* row = p.seen + static_cast<int64_t>(blockIdx.x) * ((p.vocab_size + 31) / 32);
  const int32_t end = p.cu_seqlens[blockIdx.x + 1];
  for (int32_t i = p.cu_seqlens[blockIdx.x] + static_cast<int32_t>(threadIdx.x); i < end; i += kMarkThreads) {
    const int32_t token = p.tokens[i];
    if (token >= 0 && token < p.vocab_size) atomicOr(row + token / 32, 1U << (token % 32));
  }
}

struct Grid {
  int threads, blocks, cluster;  // blocks of a sequence, and how many of them are a cluster
};

Grid argmax_grid(const SamplingParams& p, int groups, const DeviceProperties& device) {
  const int wanted = (groups + kArgmaxThreads - 1) / kArgmaxThreads;
  return {kArgmaxThreads, std::clamp(4 * device.multiprocessors / p.sequences, 1, std::min(wanted, kMaxBlocks)), 1};
}

Grid sample_grid(const SamplingParams& p, int groups, const DeviceProperties& device) {
  constexpr int kFewestGroups = 128;                                 // that are worth a block: work for four warps
  int cluster = device.programmatic_launch ? Cluster::kMaxSize : 1;  // a device has both or neither
  while (cluster > 1 && (cluster * p.sequences > device.multiprocessors || cluster / 2 * kCutThreads >= groups)) {
    cluster /= 2;
  }
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
  if (p.settings == nullptr || p.greedy) {
    return launch_on_grid(argmax<T, kWidth>, p, argmax_grid(p, groups, device), device, stream);
  }
  return launch_on_grid(sample<T, kWidth>, p, sample_grid(p, groups, device), device, stream);
}

template <typename T>
cudaError_t launch(const SamplingParams& p, cudaStream_t stream) {
  const bool in_packs = reinterpret_cast<uintptr_t>(p.logits) % sizeof(FullPack) == 0 && p.vocab_size % kVec<T> == 0 &&
                        (p.logits_row_stride % kVec<T> == 0 || p.sequences == 1);
  return in_packs ? launch_in_groups<T, kVec<T>>(p, stream) : launch_in_groups<T, 1>(p, stream);
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
      p.logits_row_stride < 0 || (p.greedy && p.settings == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (p.sequences == 0) return cudaSuccess;
  if (p.logits == nullptr || p.tokens == nullptr || p.workspace == nullptr || p.semaphores == nullptr) {
    return cudaErrorInvalidValue;
  }
  return with_type(p.dtype, [&](auto zero) { return launch<decltype(zero)>(p, stream); });
}

cudaError_t launch_mark_seen(const MarkSeenParams& p, cudaStream_t stream) {
  if (p.sequences < 0 || p.vocab_size <= 0) return cudaErrorInvalidValue;
  if (p.sequences == 0) return cudaSuccess;
  if (p.tokens == nullptr || p.cu_seqlens == nullptr || p.seen == nullptr) return cudaErrorInvalidValue;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return launch_kernel(mark_seen, dim3(p.sequences), dim3(kMarkThreads), 0, device, stream, p);
}

}  // namespace qwen_plugins
