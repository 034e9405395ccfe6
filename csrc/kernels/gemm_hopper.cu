#include <algorithm>
#include <array>
#include <mutex>

#include "gemm_hopper.cuh"
#include "gemm_hopper.h"
#include "gemm_stream.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMaxRows = 64;
constexpr int kMaxSplits = 8;
constexpr int kMinChunks = 8;  // of k for each block of a cluster

// How a product is cut: into tiles of 64 `groups` weight rows, and k into `splits`.
struct Cut {
  int groups;
  int splits;
};

decltype(&cuTensorMapEncodeTiled) load_describe() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Describes to the copy engine an array and the boxes of it that are copied at once, in the 128-byte swizzle.
template <size_t kRank>
bool describe(CUtensorMap& tensor, DataType dtype, const void* data, const std::array<cuuint64_t, kRank>& sizes,
              const std::array<cuuint64_t, kRank - 1>& strides, const std::array<cuuint32_t, kRank>& box) {
  static const auto encode = load_describe();
  if (encode == nullptr) return false;
  std::array<cuuint32_t, kRank> steps;
  steps.fill(1);
  return encode(&tensor,
                dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank,
                const_cast<void*>(data), sizes.data(), strides.data(), box.data(), steps.data(),
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool describe_weight(CUtensorMap& tensor, const GemmParams& params, int groups) {
  const GemmShape& shape = params.shape;
  const auto in_features = static_cast<cuuint64_t>(shape.in_features);
  const auto out_features = static_cast<cuuint64_t>(shape.out_features);
  const auto box_rows = static_cast<cuuint32_t>(kHopperTileRows * groups);
  const cuuint64_t row_bytes = 2 * in_features;
  if (shape.activation == Activation::kSwiglu) {  // k, row of 8, gate or up, 8 rows
    return describe<4>(tensor, shape.dtype, params.weight, {in_features, 8, 2, out_features / 16},
                       {row_bytes, row_bytes * (out_features / 2), row_bytes * 8}, {kHopperChunk, 8, 2, box_rows / 16});
  }
  const cuuint64_t all_bytes = row_bytes * out_features;
  return describe<4>(tensor, shape.dtype, params.weight, {in_features, out_features, 1, 1},
                     {row_bytes, all_bytes, all_bytes}, {kHopperChunk, box_rows, 1, 1});
}

template <int kRows>
bool describe_x(CUtensorMap& tensor, const GemmParams& params) {
  const GemmShape& shape = params.shape;
  return describe<2>(tensor, shape.dtype, params.x,
                     {static_cast<cuuint64_t>(shape.in_features), static_cast<cuuint64_t>(shape.rows)},
                     {static_cast<cuuint64_t>(2 * params.x_row_stride)}, {kHopperChunk, kRows});
}

// A launch of blocks of `groups` groups of warps, each on a multiprocessor of its own, in clusters of `splits`.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  Launch(const Cut& cut, int blocks, size_t shared_bytes, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(cut.splits);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(128 * cut.groups + 32));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cut.splits > 1 ? 2 : 1;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
};

// How many clusters of 1, 2, ... blocks run at once, each block on a multiprocessor of its own.
using ClustersAtOnce = std::array<int, kMaxSplits + 1>;

cudaError_t query_clusters(const DeviceProperties& device, ClustersAtOnce& clusters) {
  auto* const kernel = gemm_hopper<__half, 32>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
  clusters[1] = device.multiprocessors;
  for (int splits = 2; splits <= kMaxSplits && error == cudaSuccess; ++splits) {
    const Launch launch({kMaxHopperGroups, splits}, splits, device.max_shared_memory_per_block, nullptr);
    error = cudaOccupancyMaxActiveClusters(&clusters[splits], kernel, &launch.config);
    if (error == cudaErrorInvalidClusterSize) {  // a part of a chip, without so many multiprocessors together
      cudaGetLastError();
      clusters[splits] = 0;
      error = cudaSuccess;
    }
  }
  return error;
}

// Of the current device, from the driver once for each.
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
  const int64_t rows = kHopperTileRows * groups;
  return static_cast<int>((shape.out_features + rows - 1) / rows);
}

// The cut that leaves the fewest multiprocessors without work, on average over the rounds of tiles. Larger tiles read x
// less often, but have more sums to exchange.
Cut cut_of(const GemmShape& shape, const ClustersAtOnce& clusters) {
  constexpr double kLargeTilesExchange = 0.85;  // measured: docs/gemm.md
  Cut best{3, 1};
  double most = 0.0;
  for (const int groups : {3, 2}) {
    const int tiles = tiles_of(shape, groups);
    for (int splits = 1; splits <= kMaxSplits; ++splits) {
      const bool at_once = tiles <= clusters[splits];
      if (splits > 1 && (!at_once || shape.in_features < int64_t{splits} * kMinChunks * kHopperChunk)) break;
      const int rounds = (tiles + clusters[splits] - 1) / clusters[splits];
      double busy = static_cast<double>(tiles) * splits / rounds;
      if (groups == 3 && splits > 1) busy *= kLargeTilesExchange;
      if (busy <= most) continue;
      most = busy;
      best = {groups, splits};
    }
  }
  return best;
}

template <typename T, int kRows>
cudaError_t launch_cut(const GemmParams& params, const Cut& cut, const DeviceProperties& device, cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  // First of all, because it makes the device's context this thread's, which the descriptions below need.
  auto* const kernel = gemm_hopper<T, kRows>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
      error != cudaSuccess) {
    return error;
  }
  HopperArguments arguments{};
  if (!describe_weight(arguments.weight, params, cut.groups) || !describe_x<kRows>(arguments.x, params)) {
    return cudaErrorNotSupported;
  }
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.columns = static_cast<int32_t>(arguments.swiglu ? shape.out_features / 2 : shape.out_features);
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = static_cast<int32_t>((shape.in_features + kHopperChunk - 1) / kHopperChunk);
  arguments.tiles = tiles_of(shape, cut.groups);
  arguments.constant_weight = params.constant_weight;
  const int stage_bytes = hopper_stage_bytes<kRows>(cut.groups);
  const int other_bytes = kHopperSharedOverhead + hopper_received_bytes<kRows>(cut.groups, cut.splits);
  arguments.stages = std::min(kMaxHopperStages, (device.max_shared_memory_per_block - other_bytes) / stage_bytes);
  const size_t shared_bytes = static_cast<size_t>(other_bytes) + static_cast<size_t>(arguments.stages) * stage_bytes;
  const int blocks = cut.splits > 1 ? arguments.tiles * cut.splits : std::min(arguments.tiles, device.multiprocessors);
  const Launch launch(cut, blocks, shared_bytes, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, arguments);
}

template <typename T>
cudaError_t launch_cut_of_type(const GemmParams& params, const Cut& cut, const DeviceProperties& device,
                               cudaStream_t stream) {
  if (params.shape.rows <= 32) return launch_cut<T, 32>(params, cut, device, stream);
  if (params.shape.rows <= 48) return launch_cut<T, 48>(params, cut, device, stream);
  return launch_cut<T, 64>(params, cut, device, stream);
}

cudaError_t launch_with(const GemmParams& params, const Cut& cut, const DeviceProperties& device, cudaStream_t stream) {
  return params.shape.dtype == DataType::kFloat16 ? launch_cut_of_type<__half>(params, cut, device, stream)
                                                  : launch_cut_of_type<__nv_bfloat16>(params, cut, device, stream);
}

}  // namespace

bool has_hopper_gemm(const GemmParams& params, const DeviceProperties& device) {
  const GemmShape& shape = params.shape;
  const int64_t columns = shape.activation == Activation::kSwiglu ? shape.out_features / 2 : shape.out_features;
  const auto addresses = reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight) |
                         reinterpret_cast<uintptr_t>(params.y);
  const bool can = device.major == 9 && shape.dtype != DataType::kFloat32 && shape.rows > kMaxStreamedRows &&
                   shape.rows <= kMaxRows && addresses % 16 == 0 && shape.in_features % 8 == 0 &&
                   params.x_row_stride % 8 == 0 && columns % 8 == 0;
  // The sums of many rows take long to exchange, beside a small weight. Measured in whole steps: docs/gemm.md.
  const int64_t least_weight = shape.rows <= 32 ? int64_t{1} << 22 : int64_t{1} << 24;
  return can && shape.in_features * shape.out_features >= least_weight;
}

cudaError_t launch_gemm_hopper(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  return launch_with(params, cut_of(params.shape, clusters), device, stream);
}

}  // namespace qwen_plugins
