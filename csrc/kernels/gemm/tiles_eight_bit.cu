#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "hopper_clusters.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/tensor_map.h"
#include "tiles_eight_bit.cuh"
#include "tiles_eight_bit.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMaxSumsBytes = int64_t{40} << 20;
constexpr int64_t kMinChunks = 2;  // of a share

// How a GEMM is divided: the weight rows of a tile, the blocks of a cluster, and the shares of a tile's k.
struct Tiling {
  int columns;
  int cluster_rows, cluster_columns;
  int splits;  // of each tile; kLast: all clusters have equal shares of the tiles of the last wave
  int blocks() const { return cluster_rows * cluster_columns; }
};
constexpr int kLast = 14;
constexpr std::array<int, 3> kTileColumns{128, 192, 256};
constexpr std::array<int, 7> kSplits{1, 2, 3, 4, 6, 8, kLast};
constexpr std::array<std::array<int, 2>, 3> kClusters{{{1, 1}, {2, 1}, {1, 2}}};  // rows and columns
constexpr int64_t kMaxSplits = 8;
constexpr int kColumnsUnit = 32;

// The number of the kernel's variant, and its name.
constexpr int32_t variant_of(const Tiling& tiling) {
  const int cluster = tiling.cluster_rows == 2 ? 2 : tiling.cluster_columns == 2 ? 3 : 1;
  return (tiling.columns / kColumnsUnit * 4 + cluster) * 16 + tiling.splits;
}
constexpr Tiling tiling_of(int32_t variant) {
  const int cluster = variant / 16 % 4;
  return {variant / 64 * kColumnsUnit, cluster == 2 ? 2 : 1, cluster == 3 ? 2 : 1, variant % 16};
}
std::string name_of(const Tiling& tiling) {
  const std::string cluster = tiling.cluster_rows == 2 ? "r2" : tiling.cluster_columns == 2 ? "c2" : "";
  const std::string splits = tiling.splits == kLast ? "l" : "s" + std::to_string(tiling.splits);
  return "n" + std::to_string(tiling.columns) + cluster + splits;
}

int64_t chunks_of(const GemmShape& shape) { return divide_up(shape.in_features, 2 * kBlockK); }
int64_t row_tiles_of(const GemmShape& shape, const Tiling& tiling) {
  return divide_up(shape.rows, kEightBitRows * tiling.cluster_rows);
}
int64_t column_tiles_of(const GemmShape& shape, const Tiling& tiling) {
  return divide_up(shape.out_features, tiling.columns * tiling.cluster_columns);
}
int64_t tiles_of(const GemmShape& shape, const Tiling& tiling) {
  return row_tiles_of(shape, tiling) * column_tiles_of(shape, tiling);
}
// Tiles that are not divided, before the others.
int64_t whole_tiles_of(const GemmShape& shape, const Tiling& tiling, const ClustersAtOnce& clusters) {
  const int64_t tiles = tiles_of(shape, tiling), at_once = clusters[tiling.blocks()];
  if (tiling.splits == 1) return tiles;
  return tiling.splits == kLast ? tiles / at_once * at_once : 0;
}
// The shares of the others.
int64_t shares_of(const GemmShape& shape, const Tiling& tiling, const ClustersAtOnce& clusters) {
  if (tiling.splits == 1) return 0;
  return tiling.splits == kLast ? clusters[tiling.blocks()] : tiles_of(shape, tiling) * tiling.splits;
}
int64_t sums_bytes_of(int64_t shares, const Tiling& tiling) {
  return 2 * shares * tiling.blocks() * kEightBitRows * tiling.columns * 4;
}
int64_t sums_bytes(const GemmShape& shape, const Tiling& tiling, const ClustersAtOnce& clusters) {
  return sums_bytes_of(shares_of(shape, tiling, clusters), tiling);
}
bool is_possible(const GemmShape& shape, const Tiling& tiling, const ClustersAtOnce& clusters) {
  if (clusters[tiling.blocks()] == 0) return false;
  const bool blocks = shape.weight_format.group_size != 0;
  if (shape.weight_format.kind == WeightKind::kFp8Rows && blocks && tiling.columns > 128) return false;
  if (tiling.splits == 1) return true;
  const int64_t whole_tiles = whole_tiles_of(shape, tiling, clusters);
  if (tiling.splits == kLast && whole_tiles == 0) return false;  // there is but one wave
  const int64_t divided_tiles = tiles_of(shape, tiling) - whole_tiles;
  return divided_tiles * chunks_of(shape) >= kMinChunks * shares_of(shape, tiling, clusters) &&
         sums_bytes(shape, tiling, clusters) <= kMaxSumsBytes;
}

// The operands with pairs of codes as elements of 16 bits.
GemmParams in_pairs(const GemmParams& params) {
  GemmParams pairs = params;
  pairs.shape.dtype = DataType::kFloat16;
  pairs.shape.in_features /= 2;
  pairs.x_row_stride /= 2;
  return pairs;
}

// The coordinates are: column, of codes in pairs, and row.
bool encode_y_tensor_map(CUtensorMap& tensor_map, const GemmShape& shape, void* y) {
  const int64_t row_bytes = columns_of(shape) * size_of(y_type_of(shape));
  const int slot_tiles = shape.activation == Activation::kSwiglu ? kSlotTiles<true> : kSlotTiles<false>;
  return encode_store_tensor_map(
      tensor_map, y, {static_cast<cuuint64_t>(row_bytes / 2), static_cast<cuuint64_t>(shape.rows)},
      {static_cast<cuuint64_t>(row_bytes)}, {static_cast<cuuint32_t>(slot_tiles * (shape.quantized_y ? 4 : 8)), 16});
}

template <typename Sum, int kColumns, bool kBlockScales>
cudaError_t launch_tiles(const GemmParams& params, const Tiling& tiling, const ClustersAtOnce& at_once,
                         const DeviceProperties& device, cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  constexpr int kSharedBytes = EightBitLayout<kColumns>::kBytes;
  auto* const kernel = gemm_eight_bit_tiles<Sum, kColumns, kBlockScales>;
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  TilesEightBitArguments arguments{};
  if (!encode_weight_tensor_map(arguments.weight, in_pairs(params), kColumns / tiling.cluster_rows) ||
      !encode_x_tensor_map(arguments.x, in_pairs(params), kEightBitRows / tiling.cluster_columns) ||
      !encode_y_tensor_map(arguments.y, shape, params.y)) {
    return cudaErrorNotSupported;
  }
  arguments.bias = params.bias;
  arguments.weight_scales = static_cast<const float*>(params.scales);
  arguments.x_scales = params.x_scales;
  arguments.y_scale = params.y_scale;
  arguments.sums = static_cast<int4*>(params.workspace);
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = static_cast<int32_t>(chunks_of(shape));
  arguments.cluster_rows = tiling.cluster_rows;
  arguments.cluster_columns = tiling.cluster_columns;
  arguments.row_tiles = static_cast<int32_t>(row_tiles_of(shape, tiling));
  arguments.column_tiles = static_cast<int32_t>(column_tiles_of(shape, tiling));
  const int64_t band_height = std::min<int64_t>(16 / tiling.cluster_rows, arguments.row_tiles);
  arguments.band_tiles = EightBitDivisor(band_height * arguments.column_tiles);
  arguments.band_height = EightBitDivisor(band_height);
  const int64_t last_height = arguments.row_tiles % band_height;
  arguments.last_height = EightBitDivisor(last_height == 0 ? band_height : last_height);
  arguments.whole_tiles = static_cast<int32_t>(whole_tiles_of(shape, tiling, at_once));
  const auto shares = static_cast<int32_t>(shares_of(shape, tiling, at_once));
  arguments.shares = arguments.whole_tiles + shares;
  arguments.tile_columns = kColumns;
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.block_scales = kBlockScales;
  arguments.x_scale_per_row = shape.x_scale_per_row;
  arguments.quantized_y = shape.quantized_y;
  arguments.bfloat16 = shape.dtype == DataType::kBFloat16;
  arguments.constant_weight = params.constant_weight;
  const int blocks = tiling.blocks();
  const auto clusters = static_cast<unsigned>(std::min(arguments.shares, at_once[blocks]));
  const cudaError_t error = launch_clusters(kernel, dim3(clusters * blocks), dim3(kEightBitThreads), kSharedBytes,
                                            blocks, device, stream, arguments);
  if (error != cudaSuccess || tiling.splits == 1) return error;
  const dim3 adders(static_cast<unsigned>((shares - 1) * blocks * kEightBitGroups), kColumns / kAddedColumns);
  return launch_kernel(gemm_eight_bit_tiles_add<Sum>, adders, dim3(kWarpgroupThreads), 0, device, stream, arguments);
}

cudaError_t launch_tiling(const GemmParams& params, const Tiling& tiling, const ClustersAtOnce& clusters,
                          const DeviceProperties& device, cudaStream_t stream) {
  const WeightFormat& format = params.shape.weight_format;
  if (format.kind == WeightKind::kInt8Rows) {
    if (tiling.columns == 128) return launch_tiles<int32_t, 128, false>(params, tiling, clusters, device, stream);
    if (tiling.columns == 192) return launch_tiles<int32_t, 192, false>(params, tiling, clusters, device, stream);
    return launch_tiles<int32_t, 256, false>(params, tiling, clusters, device, stream);
  }
  if (format.group_size != 0) return launch_tiles<float, 128, true>(params, tiling, clusters, device, stream);
  if (tiling.columns == 128) return launch_tiles<float, 128, false>(params, tiling, clusters, device, stream);
  if (tiling.columns == 256) return launch_tiles<float, 256, false>(params, tiling, clusters, device, stream);
  return launch_tiles<float, 192, false>(params, tiling, clusters, device, stream);
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  const GemmShape& shape = params.shape;
  const auto addresses = reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight) |
                         reinterpret_cast<uintptr_t>(params.y);
  const auto small_addresses =
      reinterpret_cast<uintptr_t>(params.scales) | 2 * reinterpret_cast<uintptr_t>(params.bias);
  const bool fits = has_quantized_x(shape.weight_format) && shape.dtype != DataType::kFloat32 && addresses % 16 == 0 &&
                    small_addresses % 8 == 0 && shape.in_features % 16 == 0 && params.x_row_stride % 16 == 0 &&
                    columns_of(shape) * size_of(y_type_of(shape)) % 16 == 0 && columns_of(shape) % 8 == 0;
  if (device.major != 9 || !fits) return false;
  // A tile of gate and up rows has one scale for each at a time.
  const bool in_blocks = shape.weight_format.group_size != 0;
  if (in_blocks && shape.activation == Activation::kSwiglu && columns_of(shape) % 64 != 0) return false;
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  return variant == kOwnVariant || is_possible(shape, tiling_of(variant), clusters);
}

// The microseconds of a chunk of a tile, on an H100 at its limit of power.
double chunk_time(const GemmShape& shape, int columns) {
  const bool is_int8 = shape.weight_format.kind == WeightKind::kInt8Rows;
  return columns == 128 ? (is_int8 ? 0.34 : 0.46) : columns == 192 ? (is_int8 ? 0.51 : 0.60) : (is_int8 ? 0.66 : 0.81);
}

// An estimate of the time in microseconds: fitted to measurements of Qwen2.5-7B's layers on an H100.
double estimate(const GemmShape& shape, const Tiling& tiling, const ClustersAtOnce& clusters) {
  constexpr double kEnding = 1.2, kReadBytes = 3e6, kAddedBytes = 4e6;  // of a tile; in a microsecond
  const auto at_once = static_cast<double>(clusters[tiling.blocks()]);
  const auto tiles = static_cast<double>(tiles_of(shape, tiling));
  const double tile = static_cast<double>(chunks_of(shape)) * chunk_time(shape, tiling.columns);
  const double reading = static_cast<double>(shape.in_features * shape.out_features) / kReadBytes;
  const auto sums = static_cast<double>(sums_bytes(shape, tiling, clusters));
  const double adding = tiling.splits == 1 ? 0.0 : 5.0 + sums / kAddedBytes;
  // Multicast costs a little, and saves loads where the L2 cache is the limit.
  const double all = adding + (tiling.blocks() == 1 ? 0.0 : 0.3);
  if (tiling.splits == kLast) {
    const double waves = std::floor(tiles / at_once);
    return std::max(waves * (tile + kEnding) + (tiles / at_once - waves) * tile + kEnding, reading) + all;
  }
  return std::max(std::ceil(tiles * tiling.splits / at_once) * (tile / tiling.splits + kEnding), reading) + all;
}

// All possible tilings, each after its estimated time.
using EstimatedTiling = std::pair<double, Tiling>;
std::vector<EstimatedTiling> estimated_tilings(const GemmShape& shape, const ClustersAtOnce& clusters) {
  std::vector<EstimatedTiling> tilings;
  for (const int columns : kTileColumns) {
    for (const auto& [rows, cluster_columns] : kClusters) {
      for (const int splits : kSplits) {
        const Tiling tiling{columns, rows, cluster_columns, splits};
        if (is_possible(shape, tiling, clusters)) tilings.emplace_back(estimate(shape, tiling, clusters), tiling);
      }
    }
  }
  return tilings;
}

bool is_sooner(const EstimatedTiling& a, const EstimatedTiling& b) { return a.first < b.first; }

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  constexpr size_t kMeasured = 6;
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  std::vector<EstimatedTiling> tilings = estimated_tilings(params.shape, clusters);
  std::stable_sort(tilings.begin(), tilings.end(), is_sooner);
  for (size_t i = 0; i < std::min(kMeasured, tilings.size()); ++i) {
    if (variant_of(tilings[i].second) == variant) return true;
  }
  return false;
}

// The most that a tiling of so many rows needs on any device: the shares of kLast are at most as many as the tiles.
int64_t workspace_bytes(const GemmShape& shape) {
  if (!has_quantized_x(shape.weight_format) || chunks_of(shape) <= kMinChunks) return 0;
  const int64_t splits = std::clamp<int64_t>(chunks_of(shape) / kMinChunks, 1, kMaxSplits);
  int64_t bytes = 0;
  for (const int columns : kTileColumns) {
    for (const auto& [rows, cluster_columns] : kClusters) {
      const Tiling tiling{columns, rows, cluster_columns, 1};
      bytes = std::max(bytes, sums_bytes_of(tiles_of(shape, tiling) * splits, tiling));
    }
  }
  return std::min(bytes, kMaxSumsBytes);
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  if (variant != kOwnVariant) return launch_tiling(params, tiling_of(variant), clusters, device, stream);
  const std::vector<EstimatedTiling> tilings = estimated_tilings(params.shape, clusters);
  const Tiling best = std::min_element(tilings.begin(), tilings.end(), is_sooner)->second;
  return launch_tiling(params, best, clusters, device, stream);
}

}  // namespace

GemmKernel tiles_eight_bit_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kTilesEightBit;
  kernel.name = "tiles_eight_bit";
  for (const int columns : kTileColumns) {
    for (const auto& [rows, cluster_columns] : kClusters) {
      for (const int splits : kSplits) {
        const Tiling tiling{columns, rows, cluster_columns, splits};
        kernel.variants.push_back({variant_of(tiling), name_of(tiling)});
      }
    }
  }
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = workspace_bytes;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
