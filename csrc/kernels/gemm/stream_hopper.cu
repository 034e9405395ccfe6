#include "stream_hopper.cuh"
#include "stream_hopper.h"
#include "stream_hopper_partition.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMaxRows = 256;  // that it may be the fastest for
using Rows = XRows<16, 24, 32, 48, 64, 96, 128, 192, 256>;
constexpr StreamHopperCosts kCosts{29.0, 1.0, 275.0, 6300.0, 0.35, 1600.0, 9000.0, 1600.0, 4.4, 22.0, 150.0};

const StreamHopperVariants& variants() {
  static const StreamHopperVariants all({Rows::all(), max_warpgroups_of, kCosts});
  return all;
}

template <typename T>
cudaError_t launch_of_type(const GemmParams& params, const DeviceProperties& device, int32_t number,
                           cudaStream_t stream) {
  StreamHopperVariant variant{};
  StreamHopperPartition partition;
  if (const cudaError_t error = variants().choose(params.shape, device, number, variant, partition);
      error != cudaSuccess) {
    return error;
  }
  return Rows::with(variant.x_rows, [&](auto rows) {
    return launch_stream(gemm_hopper<T, decltype(rows)::value>, StreamHopperArguments{}, params, variant, partition,
                         device, stream);
  });
}

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  const GemmShape& shape = params.shape;
  if (device.major != 9 || !is_in_packs(shape) || !is_aligned(params)) return false;
  if (shape.activation == Activation::kSwiglu && shape.out_features % 16 != 0) return false;
  return variants().fit(shape, device, number);
}

// Where the kernel is mostly the fastest (measured: docs/gemm.md).
bool is_for(const GemmParams& params, const DeviceProperties&) {
  const GemmShape& shape = params.shape;
  if (shape.rows <= 8) return false;
  if (shape.rows <= 16) return shape.in_features * shape.out_features >= int64_t{1} << 21;
  return shape.rows <= (shape.activation == Activation::kSwiglu ? 128 : 96);
}

bool is_candidate(const GemmParams& params, const DeviceProperties& device, int32_t number) {
  return params.shape.rows <= kMaxRows && variants().is_candidate(params.shape, device, number);
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t number, cudaStream_t stream) {
  return params.shape.dtype == DataType::kFloat16 ? launch_of_type<__half>(params, device, number, stream)
                                                  : launch_of_type<__nv_bfloat16>(params, device, number, stream);
}

}  // namespace

GemmKernel stream_hopper_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStreamHopper;
  kernel.name = "stream_hopper";
  kernel.variants = variants().names();
  kernel.takes = takes;
  kernel.is_for = is_for;
  kernel.is_candidate = is_candidate;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
