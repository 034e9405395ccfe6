#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <type_traits>

#include "hopper_clusters.h"
#include "hopper_operands.h"
#include "stream_quantized.cuh"
#include "stream_quantized.h"

namespace qwen_plugins {
namespace {

constexpr int kMaxSplits = kMaxClusterBlocks;
constexpr int64_t kMaxRows = 64;
constexpr std::array<int, 8> kWaves{1, 2, 3, 4, 6, 8, 12, 16};
constexpr int kMaxSplitsOfWaves = 4;  // where a block has several tiles whose k is split,
constexpr int kMaxWavesOfSplits = 6;  // of which there are at most so many

// How a GEMM is divided among blocks, whatever its size.
struct Variant {
  int splits;  // blocks of a cluster, which split k
  int waves;   // tiles of a block: one of kWaves
  bool half;   // a block takes less than half of a multiprocessor
};

const std::vector<Variant>& all_variants() {
  static const std::vector<Variant> all = [] {
    std::vector<Variant> variants;
    for (const bool half : {false, true}) {
      for (const int waves : kWaves) variants.push_back({1, waves, half});
      for (int splits = 2; splits <= kMaxSplits; ++splits) variants.push_back({splits, 1, half});
    }
    for (int splits = 2; splits <= kMaxSplitsOfWaves; ++splits) {
      for (const int waves : kWaves) {
        if (waves > 1 && waves <= kMaxWavesOfSplits) variants.push_back({splits, waves, false});
      }
    }
    return variants;
  }();
  return all;
}
// The number of the kernel's variant.
int32_t number_of(const Variant& variant) { return variant.half * 1024 + variant.splits * 32 + variant.waves; }
constexpr Variant variant_of(int32_t number) { return {number / 32 % 32, number % 32, number >= 1024}; }

std::string name_of(const Variant& variant) {
  const std::string name = "s" + std::to_string(variant.splits);
  const std::string waves = variant.waves == 1 ? "" : "w" + std::to_string(variant.waves);
  return name + waves + (variant.half ? "h" : "");
}

// Tiles of 8 rows of x that a kernel multiplies by: 1, 2, 4 or 8; 0: as integers.
int x_tiles_of(const GemmShape& shape) {
  const WeightFormat& format = shape.weight_format;
  const bool one_scale = format.group_size == 0 || format.group_size == kPackedK;  // in a chunk
  if (shape.rows <= kIntegerRows && format.kind == WeightKind::kInt4 && one_scale) return 0;
  return shape.rows <= 8 ? 1 : shape.rows <= 16 ? 2 : shape.rows <= 32 ? 4 : 8;
}

// A variant for a GEMM on a device, with so many tiles of x.
struct Partition {
  bool fits = false;  // the device can run it; all else is set only then
  int x_tiles;
  int used_blocks = 0;  // of 16 weight rows, with SwiGLU of the gate
  int tile_blocks = 0;  // of these, of a tile
  int tiles = 0;
  int chunks = 0;  // of k
  int row_warps = 0, k_warps = 0;
  int stages = 0;
  int shared_bytes = 0;
  int received_bytes = 0;
  int integer_bytes = 0;  // of x
  QuantizedStage stage{0, 0, 0, 0, false};
  int64_t loaded = 0;  // bytes, by the block that loads most

  Partition(const GemmShape& shape, const Variant& variant, const ClustersAtOnce& clusters,
            const DeviceProperties& device, int tiles_of_x)
      : x_tiles(tiles_of_x) {
    const bool swiglu = shape.activation == Activation::kSwiglu;
    used_blocks = static_cast<int>(divide_up(columns_of(shape), kPackedRows));
    chunks = static_cast<int>(divide_up(shape.in_features, kPackedK));
    const int64_t all_tiles = int64_t{clusters[variant.splits]} * variant.waves;
    if (all_tiles == 0 || chunks < variant.splits) return;
    // With few rows of x, memory is the limit, and such variants are none the better.
    if (variant.splits > 1 && variant.waves > 1 && !quantized_uses_wgmma(x_tiles)) return;
    const int64_t blocks = divide_up(int64_t{used_blocks}, all_tiles);
    const int most_warps = variant.half ? quantized_max_consumers_of_half(x_tiles) : quantized_max_consumers(x_tiles);
    const int warp_blocks = quantized_warp_blocks(x_tiles);
    if (blocks > warp_blocks * most_warps) return;
    tile_blocks = static_cast<int>(blocks);
    tiles = divide_up(used_blocks, tile_blocks);
    const int together = quantized_row_warps(x_tiles);
    row_warps = divide_up(swiglu ? 2 * tile_blocks : tile_blocks, warp_blocks * together) * together;
    if (row_warps > most_warps) return;
    k_warps = std::clamp(most_warps / row_warps, 1, chunks / variant.splits);
    const int64_t loads = int64_t{variant.waves} * divide_up(chunks, variant.splits);
    const WeightFormat& format = shape.weight_format;
    const int groups_of_chunk = format.group_size == 0 ? 0 : kPackedK / format.group_size;
    stage = QuantizedStage(x_tiles, bits_of(format.kind), (swiglu ? 2 : 1) * tile_blocks, groups_of_chunk,
                           format.has_zeros);
    loaded = loads * stage.stride;
    received_bytes = quantized_received_bytes(x_tiles, row_warps, k_warps, variant.splits);
    if (quantized_uses_integers(x_tiles)) integer_bytes = divide_up(chunks, variant.splits) * kIntegerChunkBytes;
    // A last warp with one block reads a block behind the last stage.
    const int others = kQuantizedBarrierBytes + superblock_bytes_of(format.kind) +
                       (variant.waves > 1 ? 2 : 1) * received_bytes + integer_bytes;
    // The runtime keeps 1 KB for each block.
    const int half_bytes = (device.max_shared_memory_per_block + 1024) / 2 - 1024;
    const int most_bytes = variant.half ? half_bytes : device.max_shared_memory_per_block;
    const int64_t room = (most_bytes - others) / stage.stride;
    // A multiple of k_warps: a stage is always multiplied by the same k warp.
    stages = static_cast<int>(std::min<int64_t>({room, divide_up(loads, k_warps) * k_warps, kQuantizedMaxStages}));
    stages = stages / k_warps * k_warps;
    shared_bytes = others + stages * stage.stride;
    // Two blocks of a launch must not share a multiprocessor while another has none.
    if (!variant.half) shared_bytes = std::max(shared_bytes, half_bytes + 1024);
    // A warpgroup waits for its next chunk before it releases one.
    const bool has_next_stage =
        !quantized_uses_wgmma(x_tiles) || stages >= 2 * k_warps || divide_up(chunks, variant.splits) <= k_warps;
    fits = stages >= std::min<int64_t>(3, loads) && has_next_stage;
  }
};

Partition partition_of(const GemmShape& shape, const Variant& variant, const ClustersAtOnce& clusters,
                       const DeviceProperties& device) {
  const Partition partition(shape, variant, clusters, device, x_tiles_of(shape));
  // With very many in_features the integers of x leave too little shared memory to the weight.
  const bool leaves_integers = !partition.fits && quantized_uses_integers(partition.x_tiles);
  return leaves_integers ? Partition(shape, variant, clusters, device, 1) : partition;
}

// About how many cycles a launch takes in a chain of launches. Not a theory: the constants are fitted to measurements
// on an H100, so that the order of the variants comes out right (docs/gemm.md).
double cycles_of_mma(const Variant& variant, const Partition& partition, double memory) {
  const double x_tiles = quantized_item_tiles(partition.x_tiles);
  const double loading = static_cast<double>(partition.loaded) / 30.0;
  const double warp_cycles = quantized_uses_integers(partition.x_tiles) ? 45.0 : 77.0;
  const double chunk =
      std::max(940.0, warp_cycles * partition.row_warps * partition.k_warps) * (0.92 + 0.08 * x_tiles * x_tiles);
  const double chunks = variant.waves * divide_up(divide_up(partition.chunks, variant.splits), partition.k_warps);
  const double multiprocessor = std::max(loading, chunk * chunks);
  const double exchange = variant.splits == 1 ? 0.0 : 440.0 + 410.0 * x_tiles;
  const double sums = 4.2 * partition.row_warps * partition.k_warps * variant.splits * x_tiles;
  return std::max(multiprocessor, memory) + 0.13 * std::min(multiprocessor, memory) + 4750.0 + exchange +
         150.0 * variant.waves + sums;
}
double cycles_of_wgmma(const Variant& variant, const Partition& partition, double memory) {
  const double warps = partition.row_warps * partition.k_warps;
  const double loading = static_cast<double>(partition.loaded) / 53.0;
  const double chunk = std::max(740.0 + 130.0 * partition.k_warps, 12.5 * partition.x_tiles * warps);
  const double chunks = variant.waves * divide_up(divide_up(partition.chunks, variant.splits), partition.k_warps);
  const double multiprocessor = std::max(loading, chunk * chunks);
  const double sums = partition.received_bytes == 0 ? 0.0 : 11.0 * warps * variant.splits * partition.x_tiles;
  return std::max(multiprocessor, memory) + 0.35 * std::min(multiprocessor, memory) + 5860.0 + variant.waves * sums;
}
double cycles(const GemmShape& shape, const Variant& variant, const Partition& partition) {
  const PackedSizes sizes(shape.weight_format, shape.out_features, shape.in_features);
  const double memory = static_cast<double>(sizes.code_bytes) / 1790.0;
  return quantized_uses_wgmma(partition.x_tiles) ? cycles_of_wgmma(variant, partition, memory)
                                                 : cycles_of_mma(variant, partition, memory);
}

// How many cycles a variant takes, about; infinite where the device cannot run this GEMM in it.
double cycles_or_infinite(const GemmShape& shape, const Variant& variant, const ClustersAtOnce& clusters,
                          const DeviceProperties& device) {
  const Partition partition = partition_of(shape, variant, clusters, device);
  return partition.fits ? cycles(shape, variant, partition) : std::numeric_limits<double>::infinity();
}

// Gives the variant that should be the fastest; cudaErrorNotSupported where the device can run this GEMM in none.
cudaError_t choose_variant(const GemmShape& shape, const DeviceProperties& device, Variant& best) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  double fewest = std::numeric_limits<double>::infinity();
  for (const Variant& variant : all_variants()) {
    const double cost = cycles_or_infinite(shape, variant, clusters, device);
    if (cost >= fewest) continue;
    fewest = cost;
    best = variant;
  }
  return fewest < std::numeric_limits<double>::infinity() ? cudaSuccess : cudaErrorNotSupported;
}

StreamQuantizedArguments arguments_of(const GemmParams& params, const Variant& variant, const Partition& partition) {
  const GemmShape& shape = params.shape;
  const WeightFormat& format = shape.weight_format;
  StreamQuantizedArguments arguments{};
  arguments.integer_x = params.x;
  arguments.x_row_stride = params.x_row_stride;
  arguments.in_features = static_cast<int32_t>(shape.in_features);
  arguments.codes = static_cast<const uint8_t*>(params.weight);
  arguments.scales = static_cast<const uint16_t*>(params.scales);
  arguments.zeros = static_cast<const uint8_t*>(params.zeros);
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = partition.chunks / variant.splits;
  arguments.extra_chunks = partition.chunks % variant.splits;
  arguments.row_blocks =
      static_cast<int32_t>(PackedSizes(format, shape.out_features, shape.in_features).rows / kPackedRows);
  arguments.used_blocks = partition.used_blocks;
  arguments.up_blocks = arguments.columns / kPackedRows;
  arguments.tile_blocks = partition.tile_blocks;
  arguments.tiles = partition.tiles;
  arguments.splits = variant.splits;
  arguments.splits_inverse = static_cast<uint32_t>(divide_up(65536, variant.splits));
  arguments.row_warps = partition.row_warps;
  arguments.row_warps_inverse = static_cast<uint32_t>(divide_up(65536, partition.row_warps));
  arguments.k_warps = partition.k_warps;
  arguments.stages = partition.stages;
  arguments.groups_of_chunk = format.group_size == 0 ? 0 : kPackedK / format.group_size;
  arguments.stage_stride = partition.stage.stride;
  arguments.scales_offset = partition.stage.scales;
  arguments.zeros_offset = partition.stage.zeros;
  arguments.received_bytes = partition.received_bytes;
  arguments.x_offset =
      partition.stages * partition.stage.stride + (variant.waves > 1 ? 2 : 1) * partition.received_bytes;
  arguments.swiglu = shape.activation == Activation::kSwiglu;
  arguments.bfloat16_scales = format.scale_dtype == DataType::kBFloat16;
  arguments.writes_pairs = arguments.columns % 2 == 0 && reinterpret_cast<uintptr_t>(params.y) % 4 == 0;
  arguments.constant_weight = params.constant_weight;
  return arguments;
}

template <typename T, int kBits, int kXTiles>
cudaError_t launch_kernel_of(const GemmParams& params, const Variant& variant, const Partition& partition, int clusters,
                             const DeviceProperties& device, cudaStream_t stream) {
  // Before the tensor map, since it makes the device's context current in this thread, as encoding tensor maps
  // requires.
  auto* const kernel = gemm_quantized<T, kBits, kXTiles>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
      error != cudaSuccess) {
    return error;
  }
  StreamQuantizedArguments arguments = arguments_of(params, variant, partition);
  if (kXTiles > 0 && !encode_x_tensor_map(arguments.x, params, 8 * kXTiles)) return cudaErrorNotSupported;
  const int blocks = std::min(partition.tiles, clusters) * variant.splits;
  const int threads = 32 * (partition.row_warps * partition.k_warps + kQuantizedProducerWarps);
  return launch_clusters(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                         static_cast<size_t>(partition.shared_bytes), variant.splits, device, stream, arguments);
}

template <typename T, int kBits>
cudaError_t launch_bits(const GemmParams& params, const Variant& variant, const DeviceProperties& device,
                        cudaStream_t stream) {
  ClustersAtOnce clusters;
  if (const cudaError_t error = clusters_at_once(device, clusters); error != cudaSuccess) return error;
  const Partition partition = partition_of(params.shape, variant, clusters, device);
  if (!partition.fits) return cudaErrorNotSupported;
  const auto launch = [&](auto x_tiles) {
    return launch_kernel_of<T, kBits, x_tiles.value>(params, variant, partition, clusters[variant.splits], device,
                                                     stream);
  };
  switch (partition.x_tiles) {
    case 0:
      if constexpr (kBits == 4) return launch(std::integral_constant<int, 0>{});
      return cudaErrorNotSupported;
    case 1:
      return launch(std::integral_constant<int, 1>{});
    case 2:
      return launch(std::integral_constant<int, 2>{});
    case 4:
      return launch(std::integral_constant<int, 4>{});
    default:
      return launch(std::integral_constant<int, 8>{});
  }
}

template <typename T>
cudaError_t launch_type(const GemmParams& params, const Variant& variant, const DeviceProperties& device,
                        cudaStream_t stream) {
  return params.shape.weight_format.kind == WeightKind::kInt4 ? launch_bits<T, 4>(params, variant, device, stream)
                                                              : launch_bits<T, 8>(params, variant, device, stream);
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  const GemmShape& shape = params.shape;
  const auto addresses =
      reinterpret_cast<uintptr_t>(params.x) | static_cast<uintptr_t>(params.x_row_stride * size_of(shape.dtype));
  if (device.major != 9 || !is_packed(shape.weight_format) || shape.dtype == DataType::kFloat32 ||
      shape.rows > kMaxRows || shape.in_features % 8 != 0 || addresses % 16 != 0) {
    return false;
  }
  // A block of gate rows belongs to a block of up rows.
  if (shape.activation == Activation::kSwiglu && columns_of(shape) % kPackedRows != 0) return false;
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  const auto fits = [&](const Variant& variant) { return partition_of(shape, variant, clusters, device).fits; };
  if (number != kOwnVariant) return fits(variant_of(number));
  return std::any_of(all_variants().begin(), all_variants().end(), fits);
}

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  const GemmShape& shape = params.shape;
  const int candidates = quantized_uses_wgmma(x_tiles_of(shape)) ? 6 : 12;  // mma: the cycles are less well known
  ClustersAtOnce clusters;
  if (clusters_at_once(device, clusters) != cudaSuccess) return false;
  const double cost = cycles_or_infinite(shape, variant_of(number), clusters, device);
  const auto is_better = [&](const Variant& other) {
    return cycles_or_infinite(shape, other, clusters, device) < cost;
  };
  return std::count_if(all_variants().begin(), all_variants().end(), is_better) < candidates;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t number, cudaStream_t stream) {
  Variant variant{};
  if (number != kOwnVariant) {
    variant = variant_of(number);
  } else if (const cudaError_t error = choose_variant(params.shape, device, variant); error != cudaSuccess) {
    return error;
  }
  return params.shape.dtype == DataType::kFloat16 ? launch_type<__half>(params, variant, device, stream)
                                                  : launch_type<__nv_bfloat16>(params, variant, device, stream);
}

}  // namespace

GemmKernel stream_quantized_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStreamQuantized;
  kernel.name = "stream_quantized";
  for (const Variant& variant : all_variants()) kernel.variants.push_back({number_of(variant), name_of(variant)});
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
