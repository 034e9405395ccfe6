#include <algorithm>
#include <array>

#include "hopper_operands.h"
#include "kernels/common/arithmetic.h"
#include "tiles_hopper.cuh"
#include "tiles_hopper.h"

namespace qwen_plugins {
namespace {

// How a GEMM is divided into tiles.
struct Tiling {
  int columns;  // weight rows of a tile
  int blocks;   // of a cluster, each with its own rows of x
};
constexpr int64_t kMaxIdleRows = kTilesRows / 2;  // with no more, half of each tile is idle
constexpr std::array<Tiling, 4> kTilings{{{256, 2}, {224, 2}, {192, 2}, {192, 1}}};

// The number of the kernel's variant.
constexpr int32_t variant_of(const Tiling& tiling) { return tiling.columns * 16 + tiling.blocks; }
constexpr Tiling tiling_of(int32_t variant) { return {variant / 16, variant % 16}; }

// The only tiling that the kernel without SwiGLU is compiled for.
constexpr Tiling kPlainTiling{224, 2};

// The share of the multiprocessors' time that computes something of use, while `at_once` tiles run at a time. The rest
// is lost to tiles that reach beyond the last row or weight row, and to the last wave's idle multiprocessors.
double useful_share(const GemmShape& shape, int64_t tile_rows, int64_t tile_columns, int64_t at_once) {
  const int64_t tiles = divide_up(shape.rows, tile_rows) * divide_up(shape.out_features, tile_columns);
  const double done = static_cast<double>(divide_up(tiles, at_once) * at_once * tile_rows * tile_columns);
  return static_cast<double>(shape.rows * shape.out_features) / done;
}

struct Choice {
  Tiling tiling;
  double useful;
};

Choice best_tiling(const GemmShape& shape, const DeviceProperties& device) {
  Choice best{kTilings[0], 0.0};
  for (const Tiling& tiling : kTilings) {
    if (tiling.blocks > device.multiprocessors) continue;
    const double useful =
        useful_share(shape, kTilesRows * tiling.blocks, tiling.columns, device.multiprocessors / tiling.blocks);
    if (useful > best.useful) best = {tiling, useful};
  }
  return best;
}

// useful_share for the tiles that cuBLASLt was seen to choose.
double useful_share_of_cublas_lt(const GemmShape& shape, const DeviceProperties& device) {
  return std::max(useful_share(shape, 128, 256, device.multiprocessors),
                  useful_share(shape, 192, 192, device.multiprocessors));
}

template <typename T, int kColumns, int kBlocks, bool kSwiglu>
cudaError_t launch_tiles(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  constexpr int kSharedBytes = TilesLayout<kColumns>::kBytes;
  auto* const kernel = gemm_hopper_tiles<T, kColumns, kBlocks, kSwiglu>;
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  TilesHopperArguments arguments{};
  if (!encode_weight_tensor_map(arguments.weight, params, kColumns / 2) ||
      !encode_x_tensor_map(arguments.x, params, kTilesRows)) {
    return cudaErrorNotSupported;
  }
  arguments.bias = params.bias;
  arguments.y = params.y;
  arguments.columns = static_cast<int32_t>(columns_of(shape));
  arguments.rows = static_cast<int32_t>(shape.rows);
  arguments.chunks = static_cast<int32_t>(divide_up(shape.in_features, kBlockK));
  arguments.row_tiles = static_cast<int32_t>(divide_up(shape.rows, kTilesRows * kBlocks));
  arguments.column_tiles = static_cast<int32_t>(divide_up(shape.out_features, kColumns));
  arguments.constant_weight = params.constant_weight;
  const int64_t tiles = int64_t{arguments.row_tiles} * arguments.column_tiles;
  const int clusters = static_cast<int>(std::min<int64_t>(tiles, device.multiprocessors / kBlocks));
  return launch_clusters(kernel, dim3(static_cast<unsigned>(clusters * kBlocks)), dim3(kTilesThreads), kSharedBytes,
                         kBlocks, device, stream, arguments);
}

template <typename T>
cudaError_t launch_tiling(const GemmParams& params, const Tiling& tiling, const DeviceProperties& device,
                          cudaStream_t stream) {
  if (params.shape.activation == Activation::kNone) return launch_tiles<T, 224, 2, false>(params, device, stream);
  if (tiling.blocks == 1) return launch_tiles<T, 192, 1, true>(params, device, stream);
  if (tiling.columns == 192) return launch_tiles<T, 192, 2, true>(params, device, stream);
  if (tiling.columns == 224) return launch_tiles<T, 224, 2, true>(params, device, stream);
  return launch_tiles<T, 256, 2, true>(params, device, stream);
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  if (!can_use_tma(params, device)) return false;
  if (reinterpret_cast<uintptr_t>(params.bias) % 4 != 0) return false;  // the bias is read in pairs
  if (variant == kOwnVariant) return device.multiprocessors >= 2;
  if (params.shape.activation == Activation::kNone && variant != variant_of(kPlainTiling)) return false;
  return tiling_of(variant).blocks <= device.multiprocessors;
}

// Whether the kernel is no slower than cuBLASLt (measured: docs/gemm.md).
bool is_for(const GemmParams& params, const DeviceProperties& device) {
  const GemmShape& shape = params.shape;
  // With fewer rows cuBLASLt is faster wherever gemm_hopper does not run.
  if (shape.rows <= kMaxIdleRows) return false;
  const Choice best = best_tiling(shape, device);
  // With SwiGLU fused there is no second kernel, and z is neither written nor read: only idle multiprocessors cost
  // more.
  if (shape.activation == Activation::kSwiglu) return best.useful >= (shape.rows <= kTilesRows ? 0.4 : 0.9);
  // Without SwiGLU cuBLASLt's kernels are a little faster where their tiles fit. It was not seen to
  // choose tiles of 224, which fit 3584 weight rows.
  return shape.rows >= 1024 && best.tiling.columns == 224 && best.useful >= 0.9 &&
         best.useful >= useful_share_of_cublas_lt(shape, device) + 0.08;
}

bool is_candidate(const GemmParams& params, const DeviceProperties&, int32_t) {
  return params.shape.rows > kMaxIdleRows;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  const Tiling tiling = variant == kOwnVariant ? best_tiling(params.shape, device).tiling : tiling_of(variant);
  return params.shape.dtype == DataType::kFloat16 ? launch_tiling<__half>(params, tiling, device, stream)
                                                  : launch_tiling<__nv_bfloat16>(params, tiling, device, stream);
}

}  // namespace

GemmKernel tiles_hopper_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kTilesHopper;
  kernel.name = "tiles_hopper";
  for (const Tiling& tiling : kTilings) {
    kernel.variants.push_back(
        {variant_of(tiling), std::to_string(tiling.columns) + "x" + std::to_string(tiling.blocks)});
  }
  kernel.takes = takes;
  kernel.is_for = is_for;
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
