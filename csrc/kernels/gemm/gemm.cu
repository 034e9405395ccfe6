#include <algorithm>

#include "gemm.h"
#include "gemm_kernel.h"
#include "kernels/common/launch.h"
#include "stream.h"

namespace qwen_plugins {
namespace {

// What the kernels that the rules may choose need at most. For few rows that is nothing.
int64_t workspace_by_rules(const GemmShape& shape) {
  int64_t bytes = 0;
  if (is_for_stream(shape)) return bytes;
  for (const GemmKernel& kernel : gemm_kernels()) bytes = std::max(bytes, kernel.workspace_bytes(shape));
  return bytes;
}

int64_t workspace_of(const GemmShape& shape, GemmChoice choice) {
  const int64_t bytes = workspace_by_rules(shape);  // which decide where the choice does not serve
  const auto [kernel, variant] = find_kernel(choice);
  return kernel == nullptr ? bytes : std::max(bytes, kernel->workspace_bytes(shape));
}

cudaError_t launch_by_rules(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  cudaError_t error = cudaErrorNotSupported;
  const GemmKernel* kernel = nullptr;
  while (error == cudaErrorNotSupported && (kernel = next_by_rules(params, device, kernel)) != nullptr) {
    error = kernel->launch(params, device, kOwnVariant, stream);
  }
  return error;
}

// Whether the operands that a launch reads and writes are there, and packed ones are aligned as their layout says.
bool has_operands(const GemmParams& p) {
  if (p.x == nullptr || p.weight == nullptr || p.y == nullptr) return false;
  const WeightFormat& format = p.shape.weight_format;
  if (!is_quantized(format)) return true;
  if (has_quantized_x(format)) {
    return p.scales != nullptr && p.zeros == nullptr && p.x_scales != nullptr &&
           (p.y_scale != nullptr) == p.shape.quantized_y;
  }
  const auto bits = reinterpret_cast<uintptr_t>(p.weight) | reinterpret_cast<uintptr_t>(p.scales) |
                    reinterpret_cast<uintptr_t>(p.zeros);
  return p.scales != nullptr && (p.zeros != nullptr) == format.has_zeros && bits % 16 == 0;
}

}  // namespace

cudaError_t launch_choice(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  if (params.choice == GemmChoice::kByRules) return launch_by_rules(params, device, stream);
  const auto [kernel, variant] = find_kernel(params.choice);
  if (kernel == nullptr || !kernel->takes(params, device, variant)) return cudaErrorNotSupported;
  return kernel->launch(params, device, variant, stream);
}

cudaError_t gemm_workspace_bytes(const GemmShape& shape, GemmChoice choice, int64_t* bytes) {
  if (!is_valid(shape) || bytes == nullptr) return cudaErrorInvalidValue;
  *bytes = shape.rows == 0 ? 0 : workspace_of(shape, choice);
  return cudaSuccess;
}

cudaError_t launch_gemm(const GemmParams& given, cudaStream_t stream) {
  GemmParams params = given;
  if (!is_valid(params.shape)) return cudaErrorInvalidValue;
  if (params.shape.rows == 0) return cudaSuccess;
  if (!has_operands(params)) return cudaErrorInvalidValue;
  if (params.shape.rows == 1) params.x_row_stride = params.shape.in_features;
  if (params.x_row_stride < params.shape.in_features) return cudaErrorInvalidValue;
  const int64_t bytes = workspace_of(params.shape, params.choice);
  if (bytes > 0 && (params.workspace == nullptr || params.workspace_bytes < bytes)) return cudaErrorInvalidValue;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  const cudaError_t error = launch_choice(params, device, stream);
  return error == cudaErrorNotSupported ? launch_by_rules(params, device, stream) : error;
}

bool has_hopper_kernels() {
#ifdef QWEN_PLUGINS_HOPPER
  return true;
#else
  return false;
#endif
}

}  // namespace qwen_plugins
