#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "hopper_clusters.h"
#include "hopper_operands.h"
#include "stream_hopper.cuh"
#include "stream_hopper.h"

namespace qwen_plugins {
namespace {

constexpr int kMaxSplits = kMaxClusterBlocks;
constexpr int kMinStages = 3;
constexpr int kMaxXStages = 16;
constexpr int64_t kMaxRows = 256;  // that it may be the fastest for
constexpr std::array<int, 9> kXRows{16, 24, 32, 48, 64, 96, 128, 192, 256};
constexpr std::array<int, 8> kWaves{1, 2, 3, 4, 6, 8, 12, 16};

// How a GEMM is divided among blocks, whatever its size.
struct Variant {
  int x_rows;  // of a tile: one of kXRows
  int splits;  // blocks of a cluster, which split k
  int waves;   // tiles of a block: one of kWaves, and 1 where k is split
};

const std::vector<Variant>& all_variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> variants;
    for (const int x_rows : kXRows) {
      for (const int waves : kWaves) variants.push_back({x_rows, 1, waves});
      for (int splits = 2; splits <= kMaxSplits; ++splits) variants.push_back({x_rows, splits, 1});
    }
    return variants;
  }();
  return all;
}
// The number of the kernel's variant.
int32_t number_of(const Variant& variant) {
  const auto wave = std::find(kWaves.begin(), kWaves.end(), variant.waves) - kWaves.begin();
  return variant.x_rows / 8 * 64 + (variant.splits - 1) * 8 + static_cast<int32_t>(wave);
}
constexpr Variant variant_of(int32_t number) { return {number / 64 * 8, number / 8 % 8 + 1, kWaves[number % 8]}; }

std::string name_of(const Variant& variant) {
  const std::string name = "n" + std::to_string(variant.x_rows) + "s" + std::to_string(variant.splits);
  return variant.waves == 1 ? name : name + "w" + std::to_string(variant.waves);
}

constexpr int threads_of(int groups) { return kWarpgroupThreads * groups + 32 * kProducerWarps; }

// A variant for a GEMM on a device.
struct Partition {
  bool fits = false;  // the device can run it; all else is set only then
  int tile_rows = 0;  // weight rows of a tile: a multiple of 8, with SwiGLU of 16
  int groups = 0;     // consumer warpgroups
  int owned_tiles = 0;
  int64_t tiles = 0;  // of the weight and of x
  int row_tiles = 0;
  int weight_stages = 0, x_stages = 0;
  int shared_bytes = 0;
  bool is_small = false;  // two blocks fit into a multiprocessor: that of the next launch loads its first weights early

  Partition(const GemmShape& shape, const Variant& variant, const ClustersAtOnce& clusters,
            const DeviceProperties& device) {
    const int unit = shape.activation == Activation::kSwiglu ? 16 : 8;
    const int64_t chunks = divide_up(shape.in_features, kBlockK);
    const int64_t all_row_tiles = divide_up(shape.rows, variant.x_rows);
    const int64_t columns_of_tiles = int64_t{clusters[variant.splits]} * variant.waves / all_row_tiles;
    if (columns_of_tiles == 0 || chunks < variant.splits) return;
    const int64_t rows = divide_up(divide_up(shape.out_features, columns_of_tiles), unit) * unit;
    if (rows > kWarpgroupRows * max_warpgroups_of(variant.x_rows)) return;
    tile_rows = static_cast<int>(rows);
    groups = divide_up(tile_rows, kWarpgroupRows);
    owned_tiles = divide_up(variant.x_rows / 8, variant.splits);
    row_tiles = static_cast<int>(all_row_tiles);
    tiles = divide_up(shape.out_features, tile_rows) * all_row_tiles;
    const int64_t loaded = variant.waves * divide_up(chunks, variant.splits) * (tile_rows + variant.x_rows);
    // The runtime keeps 1 KB for each block. Somewhat less than all loads in flight is enough.
    const int half = (device.max_shared_memory_per_block + 1024) / 2 - 1024;
    is_small = loaded * kSwizzleBytes * 9 / 10 <= half - other_bytes(variant) && divide_into_stages(variant, half);
    fits = is_small || divide_into_stages(variant, device.max_shared_memory_per_block);
  }

 private:
  int other_bytes(const Variant& variant) const {
    return kSharedOverheadBytes + groups * staging_bytes_of(variant.x_rows) +
           received_bytes_of(groups, variant.splits, owned_tiles);
  }
  // As many stages of x as of the weight: those of x wait for the previous kernel, but come from the L2 cache.
  bool divide_into_stages(const Variant& variant, int most_bytes) {
    const int weight_bytes = tile_rows * kSwizzleBytes, x_bytes = variant.x_rows * kSwizzleBytes;
    // Operand a of the last warpgroup reaches beyond the last stage's weights.
    const int beyond = std::max(0, groups * kWarpgroupRows * kSwizzleBytes - weight_bytes - kMinStages * x_bytes);
    const int ring_bytes = most_bytes - other_bytes(variant) - beyond;
    x_stages = std::min(kMaxXStages, ring_bytes / (weight_bytes + x_bytes));
    weight_stages = std::min(kMaxStages, (ring_bytes - x_stages * x_bytes) / weight_bytes);
    shared_bytes = other_bytes(variant) + beyond + weight_stages * weight_bytes + x_stages * x_bytes;
    return x_stages >= kMinStages;
  }
};

// About how many cycles a launch takes in a chain of launches. Not a theory: the constants are fitted to measurements
// on an H200, so that the order of the variants comes out right (docs/gemm.md).
double cycles(const GemmShape& shape, const Variant& variant, const Partition& partition) {
  const double x_rows = variant.x_rows, splits = variant.splits;
  const double chunks = static_cast<double>(divide_up(divide_up(shape.in_features, kBlockK), variant.splits));
  const double load = (partition.tile_rows + x_rows) * kSwizzleBytes / 29.0;
  const double multiply = partition.groups * 4 * std::max(x_rows / 2, 16.0) + 275.0;
  const double multiprocessor = variant.waves * chunks * std::max(load, multiply);
  const double memory = 2.0 * static_cast<double>(shape.in_features * shape.out_features) / 6300.0;
  const double start = partition.is_small ? 1600.0 : 9000.0;
  const double exchange =
      variant.splits == 1 ? 0.0 : 1600.0 + (splits - 1) / splits * partition.tile_rows * x_rows * 4 / 4.4;
  const double write = 22.0 * x_rows / splits + 150.0 * variant.waves;
  return std::max(multiprocessor, memory) + 0.35 * std::min(multiprocessor, memory) + start + exchange + write;
}

// Whether a tile with fewer rows of x would need no more tiles.
bool is_padded(const GemmShape& shape, const Variant& variant) {
  const auto* const smaller = std::find(kXRows.begin(), kXRows.end(), variant.x_rows) - 1;
  return smaller >= kXRows.begin() && divide_up(shape.rows, *smaller) == divide_up(shape.rows, variant.x_rows);
}

// How many cycles a variant takes, about; infinite where the device cannot run this GEMM in it.
double cycles_or_infinite(const GemmShape& shape, const Variant& variant, const ClustersAtOnce& clusters,
                          const DeviceProperties& device) {
  const Partition partition(shape, variant, clusters, device);
  return partition.fits ? cycles(shape, variant, partition) : std::numeric_limits<double>::infinity();
}

// Gives the variant that should be the fastest; cudaErrorNotSupported where the device can run this GEMM in none.
cudaError_t choose_variant(const GemmShape& shape, const DeviceProperties& device, Variant& best) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  double fewest = std::numeric_limits<double>::infinity();
  for (const Variant& variant : all_variants()) {
    if (is_padded(shape, variant)) continue;
    const double cost = cycles_or_infinite(shape, variant, clusters, device);
    if (cost >= fewest) continue;
    fewest = cost;
    best = variant;
  }
  return fewest < std::numeric_limits<double>::infinity() ? cudaSuccess : cudaErrorNotSupported;
}

template <typename T, int kRows>
cudaError_t launch_rows(const GemmParams& params, const Variant& variant, const Partition& partition,
                        const ClustersAtOnce& clusters, const DeviceProperties& device, cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  auto* const kernel = gemm_hopper<T, kRows>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
      error != cudaSuccess) {
    return error;
  }
  StreamHopperArguments arguments{};
  if (!encode_weight_tensor_map(arguments.weight, params, partition.tile_rows) ||
      !encode_x_tensor_map(arguments.x, params, kRows)) {
    return cudaErrorNotSupported;
  }
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = static_cast<int32_t>(divide_up(shape.in_features, kBlockK));
  arguments.row_tiles = partition.row_tiles;
  arguments.tiles = static_cast<int32_t>(partition.tiles);
  arguments.tile_rows = partition.tile_rows;
  arguments.splits = variant.splits;
  arguments.owned_tiles = partition.owned_tiles;
  arguments.weight_stages = partition.weight_stages;
  arguments.x_stages = partition.x_stages;
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.writes_packs = arguments.columns % 8 == 0 && reinterpret_cast<uintptr_t>(params.y) % 16 == 0;
  arguments.constant_weight = params.constant_weight;
  const auto blocks = std::min<int64_t>(partition.tiles, clusters[variant.splits]) * variant.splits;
  return launch_clusters(kernel, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads_of(partition.groups))),
                         static_cast<size_t>(partition.shared_bytes), variant.splits, device, stream, arguments);
}

template <typename T>
cudaError_t launch_of_type(const GemmParams& params, const Variant& variant, const DeviceProperties& device,
                           cudaStream_t stream) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  const Partition partition(params.shape, variant, clusters, device);
  if (!partition.fits) return cudaErrorNotSupported;
  switch (variant.x_rows) {
    case 16:
      return launch_rows<T, 16>(params, variant, partition, clusters, device, stream);
    case 24:
      return launch_rows<T, 24>(params, variant, partition, clusters, device, stream);
    case 32:
      return launch_rows<T, 32>(params, variant, partition, clusters, device, stream);
    case 48:
      return launch_rows<T, 48>(params, variant, partition, clusters, device, stream);
    case 64:
      return launch_rows<T, 64>(params, variant, partition, clusters, device, stream);
    case 96:
      return launch_rows<T, 96>(params, variant, partition, clusters, device, stream);
    case 128:
      return launch_rows<T, 128>(params, variant, partition, clusters, device, stream);
    case 192:
      return launch_rows<T, 192>(params, variant, partition, clusters, device, stream);
    default:
      return launch_rows<T, 256>(params, variant, partition, clusters, device, stream);
  }
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  const GemmShape& shape = params.shape;
  if (device.major != 9 || !is_in_packs(shape) || !is_aligned(params)) return false;
  if (shape.activation == Activation::kSwiglu && shape.out_features % 16 != 0) return false;
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  const auto fits = [&](const Variant& variant) { return Partition(shape, variant, clusters, device).fits; };
  if (number != kOwnVariant) return fits(variant_of(number));
  return std::any_of(all_variants().begin(), all_variants().end(), fits);
}

// Where the kernel is mostly the fastest (measured: docs/gemm.md).
bool is_for(const GemmParams& params, const DeviceProperties&) {
  const GemmShape& shape = params.shape;
  if (shape.rows <= 8) return false;
  if (shape.rows <= 16) return shape.in_features * shape.out_features >= int64_t{1} << 21;
  return shape.rows <= (shape.activation == Activation::kSwiglu ? 128 : 96);
}

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  constexpr int kCandidates = 6;  // the best is at most 2 % off at 92 of the 96 GEMMs of the fit
  const GemmShape& shape = params.shape;
  ClustersAtOnce clusters;
  if (shape.rows > kMaxRows || is_padded(shape, variant_of(number)) ||
      clusters_at_once(device, clusters) != cudaSuccess) {
    return false;
  }
  const double cost = cycles_or_infinite(shape, variant_of(number), clusters, device);
  const auto is_better = [&](const Variant& other) {
    return !is_padded(shape, other) && cycles_or_infinite(shape, other, clusters, device) < cost;
  };
  return std::count_if(all_variants().begin(), all_variants().end(), is_better) < kCandidates;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t number, cudaStream_t stream) {
  Variant variant{};
  if (number != kOwnVariant) {
    variant = variant_of(number);
  } else if (const cudaError_t error = choose_variant(params.shape, device, variant); error != cudaSuccess) {
    return error;
  }
  return params.shape.dtype == DataType::kFloat16 ? launch_of_type<__half>(params, variant, device, stream)
                                                  : launch_of_type<__nv_bfloat16>(params, variant, device, stream);
}

}  // namespace

GemmKernel stream_hopper_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStreamHopper;
  kernel.name = "stream_hopper";
  for (const Variant& variant : all_variants()) kernel.variants.push_back({number_of(variant), name_of(variant)});
  kernel.takes = takes;
  kernel.is_for = is_for;
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
