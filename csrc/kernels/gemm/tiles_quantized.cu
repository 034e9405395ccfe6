#include <algorithm>
#include <array>
#include <utility>

#include "kernels/common/arithmetic.h"
#include "kernels/common/tensor_map.h"
#include "tiles_quantized.cuh"
#include "tiles_quantized.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMinRows = 17;  // with fewer, most of each tile is idle
constexpr int64_t kMaxSumsBytes = int64_t{40} << 20;

// How a GEMM is divided: the rows of x in a tile, its warpgroups, of 64 weight rows each, and the shares of a tile's k.
struct Tiling {
  int rows;
  int groups;
  int splits;  // of each tile; kEven: all clusters have equal shares of all tiles
};
constexpr int kEven = 15;
constexpr std::array<std::pair<int, int>, 3> kTileSizes{{{128, 2}, {128, 3}, {256, 2}}};  // rows and warpgroups
constexpr std::array<int, 7> kSplits{1, 2, 3, 4, 6, 8, kEven};
constexpr int32_t kRowsUnit = 64;

// The number of the kernel's variant, and its name.
constexpr int32_t variant_of(const Tiling& tiling) {
  return (tiling.groups - 2) * 128 + tiling.rows / kRowsUnit * 16 + tiling.splits;
}
constexpr Tiling tiling_of(int32_t variant) {
  return {variant % 128 / 16 * kRowsUnit, 2 + variant / 128, variant % 16};
}
std::string name_of(const Tiling& tiling) {
  const std::string weights = tiling.groups == 2 ? "" : "m" + std::to_string(64 * tiling.groups);
  const std::string splits = tiling.splits == kEven ? "e" : "s" + std::to_string(tiling.splits);
  return weights + "n" + std::to_string(tiling.rows) + splits;
}

std::vector<Tiling> all_tilings() {
  std::vector<Tiling> tilings;
  for (const auto& [rows, groups] : kTileSizes) {
    for (const int splits : kSplits) tilings.push_back({rows, groups, splits});
  }
  return tilings;
}

int64_t chunks_of(const GemmShape& shape) { return divide_up(shape.in_features, kBlockK); }
// Weight rows of a cluster's tile, and the tiles of all clusters.
constexpr int64_t cluster_weights(const Tiling& tiling) { return int64_t{64} * tiling.groups * kQuantizedCluster; }
int64_t weight_tiles_of(const GemmShape& shape, const Tiling& tiling) {
  return divide_up(shape.out_features, cluster_weights(tiling));
}
int64_t tiles_of(const GemmShape& shape, const Tiling& tiling) {
  return divide_up(shape.rows, tiling.rows) * weight_tiles_of(shape, tiling);
}
int64_t clusters_of(const DeviceProperties& device) { return device.multiprocessors / kQuantizedCluster; }
int64_t shares_of(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  return tiling.splits == kEven ? clusters_of(device) : tiles_of(shape, tiling) * tiling.splits;
}
int64_t sums_bytes(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  if (tiling.splits == 1) return 0;
  return 2 * shares_of(shape, tiling, device) * cluster_weights(tiling) * tiling.rows * 4;
}
bool is_possible(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  constexpr int64_t kMinChunks = 4;  // of a share
  if (tiling.splits == 1) return true;
  return tiles_of(shape, tiling) * chunks_of(shape) >= kMinChunks * shares_of(shape, tiling, device) &&
         sums_bytes(shape, tiling, device) <= kMaxSumsBytes;
}

// An estimate of the time, in a multiprocessor's cycles: fitted to measurements of Qwen2.5-7B's layers on an H200.
double cycles(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  const double chunk = tiling.rows == 256 ? 1350 : tiling.groups == 2 ? 880 : 1180;
  const auto clusters = static_cast<double>(clusters_of(device));
  const auto tiles = static_cast<double>(tiles_of(shape, tiling));
  const auto chunks = static_cast<double>(chunks_of(shape));
  const double ending = 1500 + 4.0 * tiling.rows;
  if (tiling.splits == 1) return std::ceil(tiles / clusters) * (chunks * chunk + ending);
  const double partial = 1000 + 24.0 * tiling.rows;
  const double adding = 7000 + static_cast<double>(sums_bytes(shape, tiling, device)) / 7000;
  if (tiling.splits == kEven) return tiles / clusters * (chunks * chunk + ending) + 2 * partial + adding;
  return std::ceil(tiles * tiling.splits / clusters) * (chunks / tiling.splits * chunk + partial) + adding;
}

// All possible tilings, the best first.
std::vector<Tiling> best_tilings(const GemmShape& shape, const DeviceProperties& device) {
  std::vector<Tiling> tilings = all_tilings();
  const auto is_impossible = [&](const Tiling& tiling) { return !is_possible(shape, tiling, device); };
  tilings.erase(std::remove_if(tilings.begin(), tilings.end(), is_impossible), tilings.end());
  std::stable_sort(tilings.begin(), tilings.end(), [&](const Tiling& a, const Tiling& b) {
    return cycles(shape, a, device) < cycles(shape, b, device);
  });
  return tilings;
}

// The coordinates are: word in 128 columns of k (kBlockK at a time), block of 16 weight rows, with SwiGLU gate (0) or
// up (1), 128 columns of k.
bool encode_codes_tensor_map(CUtensorMap& tensor_map, const GemmParams& params, int tile_weights) {
  const GemmShape& shape = params.shape;
  const PackedSizes sizes(shape.weight_format, shape.out_features, shape.in_features);
  const bool swiglu = shape.activation == Activation::kSwiglu;
  const cuuint64_t bytes = superblock_bytes_of(shape.weight_format.kind);
  const auto row_blocks = static_cast<cuuint64_t>(sizes.rows / kPackedRows);
  const auto columns = static_cast<cuuint64_t>(sizes.k / kPackedK);
  const auto parts = static_cast<cuuint32_t>(swiglu ? 2 : 1);
  const cuuint64_t part_blocks = swiglu ? static_cast<cuuint64_t>(columns_of(shape) / kPackedRows) : row_blocks;
  return encode_word_tensor_map(
      tensor_map, params.weight, {bytes / 4, part_blocks, parts, columns},
      {bytes, bytes * part_blocks, bytes * row_blocks},
      {static_cast<cuuint32_t>(bytes / 4 * kBlockK / kPackedK), tile_weights / kPackedRows / parts, parts, 1});
}

template <typename T, WeightKind kKind, typename Size>
cudaError_t launch_tiles(const GemmParams& params, const Tiling& tiling, const DeviceProperties& device,
                         cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  const WeightFormat& format = shape.weight_format;
  constexpr int kSharedBytes = QuantizedTilesLayout<kKind, Size>::kBytes;
  auto* const kernel = gemm_quantized_tiles<T, kKind, Size>;
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  QuantizedTilesArguments arguments{};
  if (!encode_codes_tensor_map(arguments.codes, params, Size::kWeights) ||
      !encode_x_tensor_map(arguments.x, params, Size::kRows / kQuantizedCluster)) {
    return cudaErrorNotSupported;
  }
  arguments.scales = static_cast<const uint16_t*>(params.scales);
  arguments.zeros = static_cast<const uint8_t*>(params.zeros);
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.sums = static_cast<float4*>(params.workspace);
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = static_cast<int32_t>(chunks_of(shape));
  arguments.groups = format.group_size == 32 ? 2 : 1;
  arguments.group_chunks = format.group_size == 0 ? arguments.chunks : std::max(1, format.group_size / kBlockK);
  arguments.scale_rows = static_cast<int32_t>(PackedSizes(format, shape.out_features, shape.in_features).rows);
  arguments.row_tiles = static_cast<int32_t>(divide_up(shape.rows, Size::kRows));
  arguments.weight_tiles = static_cast<int32_t>(weight_tiles_of(shape, tiling));
  arguments.shares = static_cast<int32_t>(shares_of(shape, tiling, device));
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.constant_weight = params.constant_weight;
  const auto clusters = static_cast<unsigned>(std::min<int64_t>(arguments.shares, clusters_of(device)));
  const cudaError_t error = launch_clusters(kernel, dim3(clusters * kQuantizedCluster), dim3(Size::kThreads),
                                            kSharedBytes, kQuantizedCluster, device, stream, arguments);
  if (error != cudaSuccess || tiling.splits == 1) return error;
  const dim3 blocks(static_cast<unsigned>((arguments.shares - 1) * kQuantizedCluster * Size::kGroups),
                    Size::kRows / kQuantizedPartRows);
  return launch_kernel(gemm_quantized_tiles_add<T, Size>, blocks, dim3(kWarpgroupThreads), 0, device, stream,
                       arguments);
}

template <typename T, WeightKind kKind>
cudaError_t launch_tiling(const GemmParams& params, const Tiling& tiling, const DeviceProperties& device,
                          cudaStream_t stream) {
  if (tiling.rows == 256) return launch_tiles<T, kKind, QuantizedTileSize<256, 2>>(params, tiling, device, stream);
  return tiling.groups == 2 ? launch_tiles<T, kKind, QuantizedTileSize<128, 2>>(params, tiling, device, stream)
                            : launch_tiles<T, kKind, QuantizedTileSize<128, 3>>(params, tiling, device, stream);
}

template <typename T>
cudaError_t launch_kind(const GemmParams& params, const Tiling& tiling, const DeviceProperties& device,
                        cudaStream_t stream) {
  return params.shape.weight_format.kind == WeightKind::kInt4
             ? launch_tiling<T, WeightKind::kInt4>(params, tiling, device, stream)
             : launch_tiling<T, WeightKind::kInt8>(params, tiling, device, stream);
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  const GemmShape& shape = params.shape;
  const WeightFormat& format = shape.weight_format;
  const auto addresses = reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.y);
  const bool fits = is_packed(format) && format.scale_dtype == shape.dtype && addresses % 16 == 0 &&
                    shape.in_features % 8 == 0 && params.x_row_stride % 8 == 0;
  if (device.major != 9 || device.multiprocessors < kQuantizedCluster || !fits || shape.rows < kMinRows) return false;
  if (columns_of(shape) % (shape.activation == Activation::kSwiglu ? kPackedRows : 8) != 0) return false;
  return variant == kOwnVariant || is_possible(shape, tiling_of(variant), device);
}

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  constexpr size_t kMeasured = 5;
  const std::vector<Tiling> tilings = best_tilings(params.shape, device);
  for (size_t i = 0; i < std::min(kMeasured, tilings.size()); ++i) {
    if (variant_of(tilings[i]) == variant) return true;
  }
  return false;
}

int64_t workspace_bytes(const GemmShape& shape) {
  return is_packed(shape.weight_format) && shape.rows >= kMinRows ? kMaxSumsBytes : 0;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  const Tiling tiling = variant == kOwnVariant ? best_tilings(params.shape, device)[0] : tiling_of(variant);
  return params.shape.dtype == DataType::kFloat16 ? launch_kind<__half>(params, tiling, device, stream)
                                                  : launch_kind<__nv_bfloat16>(params, tiling, device, stream);
}

}  // namespace

GemmKernel tiles_quantized_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kTilesQuantized;
  kernel.name = "tiles_quantized";
  for (const Tiling& tiling : all_tilings()) kernel.variants.push_back({variant_of(tiling), name_of(tiling)});
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = workspace_bytes;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
