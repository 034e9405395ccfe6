#include "stream_eight_bit.cuh"
#include "stream_eight_bit.h"
#include "stream_hopper_partition.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMaxRows = 256;  // that it may be the fastest for
using Rows = XRows<8, 16, 24, 32, 48, 64, 96, 128>;
constexpr StreamHopperCosts kCosts{49.4, 0.573, 245.0, 3311.0, 1.0, 0.0, 1007.0, 2646.0, 4.66, 11.5, 3.3};

const StreamHopperVariants& variants_of(WeightKind kind) {
  static const StreamHopperVariants int8({Rows::all(), max_warpgroups_of_codes<int32_t>, kCosts});
  static const StreamHopperVariants fp8({Rows::all(), max_warpgroups_of_codes<float>, kCosts});
  return kind == WeightKind::kInt8Rows ? int8 : fp8;
}

// The GEMM as its operands are loaded: of 16-bit elements, each of two codes.
GemmParams in_pairs(const GemmParams& params) {
  GemmParams pairs = params;
  pairs.shape.in_features /= 2;
  pairs.shape.dtype = DataType::kFloat16;
  pairs.shape.weight_format = {};
  pairs.x_row_stride /= 2;
  return pairs;
}

template <typename Sum>
cudaError_t launch_of_sums(const GemmParams& params, const DeviceProperties& device, int32_t number,
                           cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  const GemmParams pairs = in_pairs(params);
  StreamHopperVariant variant{};
  StreamHopperPartition partition;
  if (const cudaError_t error =
          variants_of(shape.weight_format.kind).choose(pairs.shape, device, number, variant, partition);
      error != cudaSuccess) {
    return error;
  }
  StreamEightBitArguments arguments{};
  arguments.x_scales = params.x_scales;
  arguments.weight_scales = static_cast<const float*>(params.scales);
  arguments.y_scale = params.y_scale;
  arguments.x_scale_per_row = shape.x_scale_per_row;
  arguments.block_scales = shape.weight_format.group_size != 0;
  arguments.bfloat16 = shape.dtype == DataType::kBFloat16;
  return Rows::with(variant.x_rows, [&](auto rows) {
    return launch_stream(gemm_eight_bit<Sum, decltype(rows)::value>, arguments, pairs, variant, partition, device,
                         stream);
  });
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  const GemmShape& shape = params.shape;
  const auto addresses = reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight) |
                         static_cast<uintptr_t>(params.x_row_stride);
  if (device.major != 9 || !has_quantized_x(shape.weight_format) || shape.dtype == DataType::kFloat32 ||
      shape.in_features % 16 != 0 || addresses % 16 != 0) {
    return false;
  }
  if (shape.activation == Activation::kSwiglu && shape.out_features % 16 != 0) return false;
  return variants_of(shape.weight_format.kind).fit(in_pairs(params).shape, device, number);
}

// Where the kernel is mostly the fastest (measured: docs/gemm.md).
bool is_for(const GemmParams& params, const DeviceProperties&) {
  return params.shape.rows <= (params.shape.activation == Activation::kSwiglu ? 128 : 192);
}

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  const GemmShape& shape = params.shape;
  return shape.rows <= kMaxRows &&
         variants_of(shape.weight_format.kind).is_candidate(in_pairs(params).shape, device, number);
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t number, cudaStream_t stream) {
  return params.shape.weight_format.kind == WeightKind::kInt8Rows
             ? launch_of_sums<int32_t>(params, device, number, stream)
             : launch_of_sums<float>(params, device, number, stream);
}

}  // namespace

GemmKernel stream_eight_bit_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStreamEightBit;
  kernel.name = "stream_eight_bit";
  kernel.variants = variants_of(WeightKind::kInt8Rows).names();
  kernel.takes = takes;
  kernel.is_for = is_for;
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
