#include <algorithm>
#include <array>
#include <mutex>

#include "hopper_operands.h"
#include "stream.h"
#include "stream_hopper.cuh"
#include "stream_hopper.h"

namespace qwen_plugins {
namespace {

constexpr int kMaxSplits = 8;
constexpr int kMinChunks = 8;  // of k for each block of a cluster

// How a GEMM is divided among blocks: a block's tile has 64 weight rows for each of its `groups` consumer warpgroups,
// and the `splits` blocks of a cluster split k.
struct Partition {
  int groups;
  int splits;
};

constexpr std::array<Partition, 2 * kMaxSplits> kPartitions = [] {
  std::array<Partition, 2 * kMaxSplits> all{};
  for (int i = 0; i < 2 * kMaxSplits; ++i) all[i] = {i < kMaxSplits ? 3 : 2, i % kMaxSplits + 1};
  return all;
}();

// The number of the kernel's variant.
constexpr int32_t variant_of(const Partition& partition) { return partition.groups * 16 + partition.splits; }
constexpr Partition partition_of(int32_t variant) { return {variant / 16, variant % 16}; }

constexpr int threads_of(int groups) { return kWarpgroupThreads * groups + 32; }

// How many clusters of 1, 2, ... blocks run at once, each block on a multiprocessor of its own.
using ClustersAtOnce = std::array<int, kMaxSplits + 1>;

cudaError_t query_clusters(const DeviceProperties& device, ClustersAtOnce& clusters) {
  auto* const kernel = gemm_hopper<__half, 32>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
  clusters[1] = device.multiprocessors;
  for (int splits = 2; splits <= kMaxSplits && error == cudaSuccess; ++splits) {
    error = max_active_clusters(reinterpret_cast<const void*>(kernel), splits, threads_of(kMaxWarpgroups),
                                device.max_shared_memory_per_block, device, &clusters[splits]);
  }
  return error;
}

// Gives the clusters of the current device, which are read from the driver once for each device.
cudaError_t clusters_at_once(const DeviceProperties& device, ClustersAtOnce& clusters) {
  static std::mutex mutex;
  static std::array<ClustersAtOnce, 64> known{};
  int index = 0;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  if (index >= static_cast<int>(known.size())) return query_clusters(device, clusters);
  const std::lock_guard lock(mutex);
  if (known[index][1] == 0) {
    if (const cudaError_t error = query_clusters(device, known[index]); error != cudaSuccess) {
      known[index] = {};
      return error;
    }
  }
  clusters = known[index];
  return cudaSuccess;
}

int tiles_of(const GemmShape& shape, int groups) {
  return static_cast<int>(divide_up(shape.out_features, kWarpgroupRows * groups));
}

// How many multiprocessors a partition keeps busy, on average over the waves of tiles; 0 where splitting k does not
// pay.
double busy_multiprocessors(const GemmShape& shape, const Partition& partition, const ClustersAtOnce& clusters) {
  const auto [groups, splits] = partition;
  const int tiles = tiles_of(shape, groups);
  if (splits > 1 && (tiles > clusters[splits] || shape.in_features < int64_t{splits} * kMinChunks * kBlockK)) return 0;
  return static_cast<double>(tiles) * splits / divide_up(tiles, clusters[splits]);
}

// Chooses the partition that keeps the most multiprocessors busy. Larger tiles read x less often, but have more partial
// sums to exchange.
Partition choose_partition(const GemmShape& shape, const ClustersAtOnce& clusters) {
  constexpr double kLargeTilesExchange = 0.85;  // measured: docs/gemm.md
  Partition best{3, 1};
  double most = 0.0;
  for (const Partition& partition : kPartitions) {
    double busy = busy_multiprocessors(shape, partition, clusters);
    if (partition.groups == 3 && partition.splits > 1) busy *= kLargeTilesExchange;
    if (busy <= most) continue;
    most = busy;
    best = partition;
  }
  return best;
}

template <typename T, int kRows>
cudaError_t launch_partition(const GemmParams& params, const Partition& partition, const DeviceProperties& device,
                             cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  auto* const kernel = gemm_hopper<T, kRows>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
      error != cudaSuccess) {
    return error;
  }
  StreamHopperArguments arguments{};
  if (!encode_weight_tensor_map(arguments.weight, params, kWarpgroupRows * partition.groups) ||
      !encode_x_tensor_map(arguments.x, params, kRows)) {
    return cudaErrorNotSupported;
  }
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = static_cast<int32_t>(divide_up(shape.in_features, kBlockK));
  arguments.tiles = tiles_of(shape, partition.groups);
  arguments.constant_weight = params.constant_weight;
  const int stage_bytes = stage_bytes_of<kRows>(partition.groups);
  const int other_bytes = kSharedOverheadBytes + received_bytes_of<kRows>(partition.groups, partition.splits);
  arguments.stages = std::min(kMaxStages, (device.max_shared_memory_per_block - other_bytes) / stage_bytes);
  const size_t shared_bytes = static_cast<size_t>(other_bytes) + static_cast<size_t>(arguments.stages) * stage_bytes;
  const int blocks =
      partition.splits > 1 ? arguments.tiles * partition.splits : std::min(arguments.tiles, device.multiprocessors);
  return launch_clusters(kernel, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads_of(partition.groups))), shared_bytes, partition.splits,
                         device, stream, arguments);
}

template <typename T>
cudaError_t launch_of_type(const GemmParams& params, const Partition& partition, const DeviceProperties& device,
                           cudaStream_t stream) {
  if (params.shape.rows <= 32) return launch_partition<T, 32>(params, partition, device, stream);
  if (params.shape.rows <= 48) return launch_partition<T, 48>(params, partition, device, stream);
  return launch_partition<T, 64>(params, partition, device, stream);
}

// Whether the device has room for the partition's clusters, and k for its splits.
bool fits(const GemmShape& shape, const Partition& partition, const DeviceProperties& device) {
  ClustersAtOnce clusters;
  return divide_up(shape.in_features, kBlockK) >= partition.splits &&
         clusters_at_once(device, clusters) == cudaSuccess && clusters[partition.splits] > 0;
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  if (params.shape.rows > kMaxStreamHopperRows || !can_use_tma(params, device)) return false;
  return variant == kOwnVariant || fits(params.shape, partition_of(variant), device);
}

// Whether the kernel is no slower than cuBLASLt (measured: docs/gemm.md).
bool is_for(const GemmParams& params, const DeviceProperties&) {
  const GemmShape& shape = params.shape;
  // Exchanging the partial sums of many rows takes long beside reading a small weight. Measured in whole decode steps:
  // docs/gemm.md.
  const int64_t least_weight = shape.rows <= 32 ? int64_t{1} << 22 : int64_t{1} << 24;
  return shape.in_features * shape.out_features >= least_weight;
}

// Whether a partition keeps at least half as many multiprocessors busy as the rules' does.
bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  const double most = busy_multiprocessors(params.shape, choose_partition(params.shape, clusters), clusters);
  return busy_multiprocessors(params.shape, partition_of(variant), clusters) >= 0.5 * most;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  const Partition partition = variant == kOwnVariant ? choose_partition(params.shape, clusters) : partition_of(variant);
  return params.shape.dtype == DataType::kFloat16 ? launch_of_type<__half>(params, partition, device, stream)
                                                  : launch_of_type<__nv_bfloat16>(params, partition, device, stream);
}

}  // namespace

GemmKernel stream_hopper_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStreamHopper;
  kernel.name = "stream_hopper";
  for (const auto& [groups, splits] : kPartitions) {
    kernel.variants.push_back(
        {variant_of({groups, splits}), "g" + std::to_string(groups) + "s" + std::to_string(splits)});
  }
  kernel.takes = takes;
  kernel.is_for = is_for;
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
