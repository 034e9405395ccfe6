#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <random>
#include <utility>

#include "cublas_lt_gemm.h"
#include "hopper_clusters.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/tensor_map.h"
#include "tiles_quantized.cuh"
#include "tiles_quantized.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMinRows = 17;               // with fewer, most of each tile is idle
constexpr int64_t kMinDequantizedRows = 4096;  // by the rules in `dequantized`, without SwiGLU
constexpr int64_t kMaxSumsBytes = int64_t{32} << 20;
constexpr int64_t kDoneBytes = 8192;
constexpr int64_t kDoneOfShare = 8 * kQuantizedCluster * kQuantizedGroups;

// How a GEMM is divided: the rows of x in a tile, and the shares of a tile's k.
struct Tiling {
  int rows;
  int splits;  // of each tile; kEven: all clusters have equal shares of all tiles
};
constexpr int kEven = 15;
constexpr std::array<int, 2> kTileRows{128, 256};
constexpr std::array<int, 7> kSplits{1, 2, 3, 4, 6, 8, kEven};
constexpr int32_t kRowsUnit = 64;

// The number of the kernel's variant, and its name.
constexpr int32_t variant_of(const Tiling& tiling) { return tiling.rows / kRowsUnit * 16 + tiling.splits; }
constexpr Tiling tiling_of(int32_t variant) { return {variant / 16 * kRowsUnit, variant % 16}; }
std::string name_of(const Tiling& tiling) {
  const std::string splits = tiling.splits == kEven ? "e" : "s" + std::to_string(tiling.splits);
  return "n" + std::to_string(tiling.rows) + splits;
}

std::vector<Tiling> all_tilings() {
  std::vector<Tiling> tilings;
  for (const int rows : kTileRows) {
    for (const int splits : kSplits) tilings.push_back({rows, splits});
  }
  return tilings;
}

constexpr int64_t kClusterWeights = int64_t{kQuantizedCluster} * kQuantizedWeights;
int64_t chunks_of(const GemmShape& shape) { return divide_up(shape.in_features, kPackedK); }
int64_t weight_tiles_of(const GemmShape& shape) { return divide_up(shape.out_features, kClusterWeights); }
int64_t tiles_of(const GemmShape& shape, const Tiling& tiling) {
  return divide_up(shape.rows, tiling.rows) * weight_tiles_of(shape);
}
int64_t clusters_of(const DeviceProperties& device) { return device.multiprocessors / kQuantizedCluster; }
int64_t shares_of(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  return tiling.splits == kEven ? clusters_of(device) : tiles_of(shape, tiling) * tiling.splits;
}
int64_t sums_bytes(int64_t shares, const Tiling& tiling) { return shares * kClusterWeights * tiling.rows * 4; }
bool is_possible(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  constexpr int64_t kMinChunks = 2;  // of a share
  if (tiling.splits == 1) return true;
  // A share for each cluster at most: so clusters wait for those before them alone, which the hardware starts first.
  const int64_t shares = shares_of(shape, tiling, device);
  return shares <= clusters_of(device) && tiles_of(shape, tiling) * chunks_of(shape) >= kMinChunks * shares &&
         sums_bytes(shares, tiling) <= kMaxSumsBytes && shares * kDoneOfShare <= kDoneBytes;
}

// An estimate of the time, in a multiprocessor's cycles: fitted to measurements of Qwen-7B's and Qwen2.5-7B's layers on
// an H200. Its first choice is 0.3 % slower than the best tiling on average.
double cycles(const GemmShape& shape, const Tiling& tiling, const DeviceProperties& device) {
  const auto clusters = static_cast<double>(clusters_of(device));
  const auto tiles = static_cast<double>(tiles_of(shape, tiling));
  const auto shares = static_cast<double>(shares_of(shape, tiling, device));
  const double chunk = tiling.rows == 256 ? 2390 : 1310;
  const double tile = static_cast<double>(chunks_of(shape)) * chunk + 1100 + 5.5 * tiling.rows;
  const double sums = tiling.splits == 1 ? 0 : 700 + 10.0 * tiling.rows;  // to write a share's
  const double adding = 1.25 * std::ceil(shares / tiles) * sums;
  return std::ceil(shares / clusters) * (tiles / shares * tile + sums + adding);
}

// All possible tilings, each after its estimated time.
using EstimatedTiling = std::pair<double, Tiling>;
std::vector<EstimatedTiling> estimated_tilings(const GemmShape& shape, const DeviceProperties& device) {
  std::vector<EstimatedTiling> tilings;
  for (const Tiling& tiling : all_tilings()) {
    if (is_possible(shape, tiling, device)) tilings.emplace_back(cycles(shape, tiling, device), tiling);
  }
  return tilings;
}

bool is_sooner(const EstimatedTiling& a, const EstimatedTiling& b) { return a.first < b.first; }

// Boxes of 64 rows and the columns of a warpgroup.
bool encode_y_tensor_map(CUtensorMap& tensor_map, const GemmParams& params) {
  const GemmShape& shape = params.shape;
  const auto columns = static_cast<cuuint64_t>(columns_of(shape));
  const cuuint32_t group_columns = shape.activation == Activation::kSwiglu ? 32 : 64;
  return encode_store_tensor_map(tensor_map, params.y, {columns, static_cast<cuuint64_t>(shape.rows)}, {2 * columns},
                                 {group_columns, kQuantizedStoreRows});
}

// A number of 64 bits, another one at each call (splitmix64).
uint64_t random_number() {
  static std::atomic<uint64_t> state{(uint64_t{std::random_device{}()} << 32) ^ std::random_device{}()};
  uint64_t number = state += 0x9e3779b97f4a7c15;
  number = (number ^ (number >> 30)) * 0xbf58476d1ce4e5b9;
  number = (number ^ (number >> 27)) * 0x94d049bb133111eb;
  return number ^ (number >> 31);
}

template <typename T, WeightKind kKind, int kRows>
cudaError_t launch_tiles(const GemmParams& params, const Tiling& tiling, const DeviceProperties& device,
                         cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  const WeightFormat& format = shape.weight_format;
  constexpr int kSharedBytes = QuantizedTilesLayout<kRows>::kBytes;
  auto* const kernel = gemm_quantized_tiles<T, kKind, kRows>;
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  QuantizedTilesArguments arguments{};
  if (!encode_x_tensor_map(arguments.x, params, kRows / kQuantizedCluster) ||
      !encode_y_tensor_map(arguments.y, params)) {
    return cudaErrorNotSupported;
  }
  arguments.codes = static_cast<const uint32_t*>(params.weight);
  arguments.scales = static_cast<const uint16_t*>(params.scales);
  arguments.zeros = static_cast<const uint8_t*>(params.zeros);
  arguments.bias = params.bias;
  arguments.sums_done = static_cast<uint64_t*>(params.workspace);
  arguments.launch = random_number();
  arguments.sums = reinterpret_cast<float4*>(static_cast<char*>(params.workspace) + kDoneBytes);
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.chunks = static_cast<int32_t>(chunks_of(shape));
  arguments.group_shift = format.group_size == 0 ? 31 : format.group_size / 64;  // 32, 64 and 128: 0, 1 and 2
  arguments.weight_rows = static_cast<int32_t>(PackedSizes(format, shape.out_features, shape.in_features).rows);
  arguments.row_tiles = static_cast<int32_t>(divide_up(shape.rows, kRows));
  arguments.weight_tiles = static_cast<int32_t>(weight_tiles_of(shape));
  arguments.shares = static_cast<int32_t>(shares_of(shape, tiling, device));
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.constant_weight = params.constant_weight;
  const auto clusters = static_cast<unsigned>(std::min<int64_t>(arguments.shares, clusters_of(device)));
  return launch_clusters(kernel, dim3(clusters * kQuantizedCluster), dim3(kQuantizedTilesThreads), kSharedBytes,
                         kQuantizedCluster, device, stream, arguments);
}

template <typename T, WeightKind kKind>
cudaError_t launch_tiling(const GemmParams& params, const Tiling& tiling, const DeviceProperties& device,
                          cudaStream_t stream) {
  return tiling.rows == 256 ? launch_tiles<T, kKind, 256>(params, tiling, device, stream)
                            : launch_tiles<T, kKind, 128>(params, tiling, device, stream);
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
  if (device.major != 9 || !fits || shape.rows < kMinRows) return false;
  ClustersAtOnce clusters{};
  if (clusters_at_once(device, clusters) != cudaSuccess || clusters[kQuantizedCluster] == 0) return false;
  if (columns_of(shape) % (shape.activation == Activation::kSwiglu ? kPackedRows : 8) != 0) return false;
  return variant == kOwnVariant || is_possible(shape, tiling_of(variant), device);
}

// With so many rows a weight is dequantized only once for many products in `dequantized`, which takes less power. Its
// SwiGLU is a kernel of its own, which takes more time.
bool is_for(const GemmParams& params, const DeviceProperties&) {
  const GemmShape& shape = params.shape;
  return shape.rows < kMinDequantizedRows || shape.activation == Activation::kSwiglu || !has_cublas_lt();
}

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  constexpr size_t kMeasured = 5;
  std::vector<EstimatedTiling> tilings = estimated_tilings(params.shape, device);
  std::stable_sort(tilings.begin(), tilings.end(), is_sooner);
  for (size_t i = 0; i < std::min(kMeasured, tilings.size()); ++i) {
    if (variant_of(tilings[i].second) == variant) return true;
  }
  return false;
}

int64_t workspace_bytes(const GemmShape& shape) {
  const bool serves = is_packed(shape.weight_format) && shape.dtype != DataType::kFloat32 && shape.rows >= kMinRows;
  return serves ? kDoneBytes + kMaxSumsBytes : 0;
}

Tiling best_tiling(const GemmShape& shape, const DeviceProperties& device) {
  const std::vector<EstimatedTiling> tilings = estimated_tilings(shape, device);
  return std::min_element(tilings.begin(), tilings.end(), is_sooner)->second;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  const Tiling tiling = variant == kOwnVariant ? best_tiling(params.shape, device) : tiling_of(variant);
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
  kernel.is_for = is_for;
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = workspace_bytes;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
