#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <utility>

#include "hopper_operands.h"
#include "stream_hopper.cuh"
#include "stream_hopper_partition.h"

namespace qwen_plugins {
namespace {

constexpr int kMaxSplits = kMaxClusterBlocks;
constexpr int kMinStages = 3;
constexpr int kMaxXStages = 16;
constexpr int kCandidates = 6;  // the best is at most 2 % off at 92 of the 96 GEMMs of the fit
constexpr std::array<int, 8> kWaves{1, 2, 3, 4, 6, 8, 12, 16};

// The number of the kernel's variant.
int32_t number_of(const StreamHopperVariant& variant) {
  const auto wave = std::find(kWaves.begin(), kWaves.end(), variant.waves) - kWaves.begin();
  return variant.half * 4096 + variant.x_rows / 8 * 64 + (variant.splits - 1) * 8 + static_cast<int32_t>(wave);
}
constexpr StreamHopperVariant variant_of(int32_t number) {
  return {number % 4096 / 64 * 8, number / 8 % 8 + 1, kWaves[number % 8], number >= 4096};
}

std::string name_of(const StreamHopperVariant& variant) {
  std::string name = "n" + std::to_string(variant.x_rows) + "s" + std::to_string(variant.splits);
  if (variant.waves > 1) name += "w" + std::to_string(variant.waves);
  return variant.half ? name + "h" : name;
}

// About how many cycles a launch takes in a chain of launches. Not a theory: the constants are fitted to measurements
// on an H200, so that the order of the variants comes out right (docs/gemm.md).
double cycles(const GemmShape& shape, const StreamHopperVariant& variant, const StreamHopperPartition& partition) {
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

}  // namespace

StreamHopperPartition::StreamHopperPartition(const GemmShape& shape, const StreamHopperVariant& variant,
                                             int max_warpgroups, const ClustersAtOnce& clusters,
                                             const DeviceProperties& device) {
  const int unit = shape.activation == Activation::kSwiglu ? 16 : 8;
  const int64_t chunks = divide_up(shape.in_features, kBlockK);
  const int64_t all_row_tiles = divide_up(shape.rows, variant.x_rows);
  const int64_t columns_of_tiles = int64_t{clusters[variant.splits]} * variant.waves / all_row_tiles;
  if (columns_of_tiles == 0 || chunks < variant.splits) return;
  const int64_t rows = divide_up(divide_up(shape.out_features, columns_of_tiles), unit) * unit;
  if (rows > kWarpgroupRows * max_warpgroups) return;
  tile_rows = static_cast<int>(rows);
  groups = divide_up(tile_rows, kWarpgroupRows);
  owned_tiles = divide_up(variant.x_rows / 8, variant.splits);
  row_tiles = static_cast<int>(all_row_tiles);
  tiles = divide_up(shape.out_features, tile_rows) * all_row_tiles;
  blocks = static_cast<int>(std::min<int64_t>(tiles, clusters[variant.splits])) * variant.splits;
  const int64_t loaded = variant.waves * divide_up(chunks, variant.splits) * (tile_rows + variant.x_rows);
  // The runtime keeps 1 KB for each block. Somewhat less than all loads in flight is enough.
  const int half = (device.max_shared_memory_per_block + 1024) / 2 - 1024;
  const bool fits_half = loaded * kSwizzleBytes * 9 / 10 <= half - other_bytes(variant);
  is_small = (variant.half || fits_half) && divide_into_stages(variant, half);
  if (variant.half) {
    fits = is_small && !fits_half;  // else it is the variant without `half`
  } else {
    fits = is_small || divide_into_stages(variant, device.max_shared_memory_per_block);
  }
}

int StreamHopperPartition::other_bytes(const StreamHopperVariant& variant) const {
  return kSharedOverheadBytes + groups * staging_bytes_of(variant.x_rows) +
         received_bytes_of(groups, variant.splits, owned_tiles);
}

// As many stages of x as of the weight: those of x wait for the previous kernel, but come from the L2 cache.
bool StreamHopperPartition::divide_into_stages(const StreamHopperVariant& variant, int most_bytes) {
  const int weight_bytes = tile_rows * kSwizzleBytes, x_bytes = variant.x_rows * kSwizzleBytes;
  // Operand a of the last warpgroup reaches beyond the last stage's weights.
  const int beyond = std::max(0, groups * kWarpgroupRows * kSwizzleBytes - weight_bytes - kMinStages * x_bytes);
  const int ring_bytes = most_bytes - other_bytes(variant) - beyond;
  x_stages = std::min(kMaxXStages, ring_bytes / (weight_bytes + x_bytes));
  weight_stages = std::min(kMaxStages, (ring_bytes - x_stages * x_bytes) / weight_bytes);
  shared_bytes = other_bytes(variant) + beyond + weight_stages * weight_bytes + x_stages * x_bytes;
  return x_stages >= kMinStages;
}

StreamHopperVariants::StreamHopperVariants(StreamHopperKernel kernel) : kernel_(std::move(kernel)) {
  for (const bool half : {false, true}) {
    if (half && !kernel_.has_halves) continue;
    for (const int x_rows : kernel_.x_rows) {
      for (const int waves : kWaves) variants_.push_back({x_rows, 1, waves, half});
      for (int splits = 2; splits <= kMaxSplits; ++splits) variants_.push_back({x_rows, splits, 1, half});
    }
  }
}

std::vector<GemmVariant> StreamHopperVariants::names() const {
  std::vector<GemmVariant> names;
  for (const StreamHopperVariant& variant : variants_) names.push_back({number_of(variant), name_of(variant)});
  return names;
}

StreamHopperPartition StreamHopperVariants::partition_of(const GemmShape& shape, const StreamHopperVariant& variant,
                                                         const ClustersAtOnce& clusters,
                                                         const DeviceProperties& device) const {
  return {shape, variant, kernel_.max_warpgroups(variant.x_rows), clusters, device};
}

// Whether a tile with fewer rows of x would need no more tiles.
bool StreamHopperVariants::is_padded(const GemmShape& shape, const StreamHopperVariant& variant) const {
  const auto same = std::find(kernel_.x_rows.begin(), kernel_.x_rows.end(), variant.x_rows);
  return same != kernel_.x_rows.begin() && divide_up(shape.rows, *(same - 1)) == divide_up(shape.rows, variant.x_rows);
}

// How many cycles a variant takes, about; infinite where the device cannot run this GEMM in it.
double StreamHopperVariants::cycles_or_infinite(const GemmShape& shape, const StreamHopperVariant& variant,
                                                const ClustersAtOnce& clusters, const DeviceProperties& device) const {
  const StreamHopperPartition partition = partition_of(shape, variant, clusters, device);
  return partition.fits ? cycles(shape, variant, partition) : std::numeric_limits<double>::infinity();
}

bool StreamHopperVariants::fit(const GemmShape& shape, const DeviceProperties& device, int32_t number) const {
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  const auto fits = [&](const StreamHopperVariant& variant) {
    return partition_of(shape, variant, clusters, device).fits;
  };
  if (number != kOwnVariant) return fits(variant_of(number));
  return std::any_of(variants_.begin(), variants_.end(), fits);
}

bool StreamHopperVariants::is_candidate(const GemmShape& shape, const DeviceProperties& device, int32_t number) const {
  const StreamHopperVariant variant = variant_of(number);
  ClustersAtOnce clusters;
  if (is_padded(shape, variant) || clusters_at_once(device, clusters) != cudaSuccess) return false;
  const double cost = cycles_or_infinite(shape, variant, clusters, device);
  const auto is_better = [&](const StreamHopperVariant& other) {
    return !is_padded(shape, other) && cycles_or_infinite(shape, other, clusters, device) < cost;
  };
  return std::count_if(variants_.begin(), variants_.end(), is_better) < kCandidates;
}

cudaError_t StreamHopperVariants::choose(const GemmShape& shape, const DeviceProperties& device, int32_t number,
                                         StreamHopperVariant& variant, StreamHopperPartition& partition) const {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  if (number != kOwnVariant) {
    variant = variant_of(number);
  } else {
    double fewest = std::numeric_limits<double>::infinity();
    for (const StreamHopperVariant& other : variants_) {
      if (is_padded(shape, other)) continue;
      const double cost = cycles_or_infinite(shape, other, clusters, device);
      if (cost >= fewest) continue;
      fewest = cost;
      variant = other;
    }
    if (fewest == std::numeric_limits<double>::infinity()) return cudaErrorNotSupported;
  }
  partition = partition_of(shape, variant, clusters, device);
  return partition.fits ? cudaSuccess : cudaErrorNotSupported;
}

cudaError_t set_arguments(const GemmParams& params, const StreamHopperVariant& variant,
                          const StreamHopperPartition& partition, StreamHopperArguments& arguments) {
  const GemmShape& shape = params.shape;
  if (!encode_weight_tensor_map(arguments.weight, params, partition.tile_rows) ||
      !encode_x_tensor_map(arguments.x, params, variant.x_rows)) {
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
  const int pack_bytes = shape.quantized_y ? 8 : 16;  // of 8 columns
  arguments.writes_packs = arguments.columns % 8 == 0 && reinterpret_cast<uintptr_t>(params.y) % pack_bytes == 0;
  arguments.constant_weight = params.constant_weight;
  return cudaSuccess;
}

dim3 threads_of(const StreamHopperPartition& partition) {
  return dim3(static_cast<unsigned>(kWarpgroupThreads * partition.groups + 32 * kProducerWarps));
}

}  // namespace qwen_plugins
