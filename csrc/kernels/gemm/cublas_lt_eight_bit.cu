#include <algorithm>

#include "cublas_lt_eight_bit.h"
#include "cublas_lt_gemm.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/quotient.cuh"
#include "silu.cuh"

namespace qwen_plugins {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxSumsBytes = int64_t{32} << 20;
constexpr int64_t kMaxGridY = 65535;

// An element of z from its sum.
template <typename T, typename Sum>
__device__ __forceinline__ float scaled(const GemmParams& p, Sum sum, int64_t column, float x_scale) {
  const float bias = p.bias == nullptr ? 0.0F : to_float(static_cast<const T*>(p.bias)[column]);
  return fmaf(static_cast<float>(sum) * static_cast<const float*>(p.scales)[column], x_scale, bias);
}

// y of all sums [rows, out_features].
template <typename T, typename Sum>
__global__ void __launch_bounds__(kThreads) finish_sums(const __grid_constant__ GemmParams p, const Sum* all_sums) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const bool swiglu = p.shape.activation == Activation::kSwiglu;
  const int64_t columns = swiglu ? p.shape.out_features / 2 : p.shape.out_features;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  for (int64_t row = blockIdx.y; row < p.shape.rows; row += gridDim.y) {
    const Sum* const sums = all_sums + row * p.shape.out_features;
    const float x_scale = p.x_scales[p.shape.x_scale_per_row ? row : 0];
    float y = scaled<T>(p, sums[column], column, x_scale);
    if (swiglu) y = silu<T>(y) * scaled<T>(p, sums[columns + column], columns + column, x_scale);
    const int64_t index = row * columns + column;
    if (!p.shape.quantized_y) {
      static_cast<T*>(p.y)[index] = from_float<T>(y);
      continue;
    }
    y *= finite_reciprocal(*p.y_scale);
    static_cast<uint8_t*>(p.y)[index] =
        static_cast<uint8_t>(std::is_same_v<Sum, int32_t> ? to_int8_bits(y) : to_float8_e4m3_bits(y));
  }
}

template <typename Sum>
cudaError_t launch_finish(const GemmParams& p, const void* sums, const DeviceProperties& device, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(columns_of(p.shape), kThreads)),
                  static_cast<unsigned>(std::min(p.shape.rows, kMaxGridY)));
  return with_type(p.shape.dtype, [&](auto zero) {
    return launch_kernel(finish_sums<decltype(zero), Sum>, grid, dim3(kThreads), 0, device, stream, p,
                         static_cast<const Sum*>(sums));
  });
}

// The rows that are computed at a time.
int64_t part_rows(const GemmShape& shape) {
  return std::min(shape.rows, std::max<int64_t>(kMaxSumsBytes / (4 * shape.out_features), 128));
}

cudaError_t launch_part(const GemmParams& p, int32_t variant, const DeviceProperties& device, cudaStream_t stream) {
  void* const sums = static_cast<char*>(p.workspace) + kCublasLtWorkspaceBytes;
  const cudaError_t error = launch_cublas_lt(p, variant, sums, p.shape.out_features, stream);
  if (error != cudaSuccess) return error;
  return p.shape.weight_format.kind == WeightKind::kInt8Rows ? launch_finish<int32_t>(p, sums, device, stream)
                                                             : launch_finish<float>(p, sums, device, stream);
}

cudaError_t launch(const GemmParams& p, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  const int64_t rows = part_rows(p.shape);
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < p.shape.rows && error == cudaSuccess; row += rows) {
    error = launch_part(rows_of(p, row, std::min(rows, p.shape.rows - row)), variant, device, stream);
  }
  return error;
}

bool serves(const GemmShape& shape) {
  return has_quantized_x(shape.weight_format) && shape.weight_format.group_size == 0 && shape.in_features % 16 == 0 &&
         shape.out_features % 16 == 0;
}

bool takes(const GemmParams& p, const DeviceProperties&, int32_t) {
  const auto addresses =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) | static_cast<uintptr_t>(p.x_row_stride);
  return serves(p.shape) && addresses % 16 == 0 && has_cublas_lt();
}

int64_t workspace_bytes(const GemmShape& shape) {
  return serves(shape) ? kCublasLtWorkspaceBytes + 4 * part_rows(shape) * shape.out_features : 0;
}

}  // namespace

GemmKernel cublas_lt_eight_bit_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kCublasLtEightBit;
  kernel.name = "cublas_lt_eight_bit";
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  // On Hopper the kernels of this library are faster.
  kernel.is_candidate = [](const GemmParams&, const DeviceProperties& device, int32_t) { return device.major != 9; };
  kernel.workspace_bytes = workspace_bytes;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
