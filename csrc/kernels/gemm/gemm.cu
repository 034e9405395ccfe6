#include <algorithm>
#include <limits>

#include "gemm.h"
#include "gemm_kernel.h"
#include "kernels/common/launch.h"
#include "stream.h"

namespace qwen_plugins {
namespace {

bool is_valid(const GemmShape& shape) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  const bool swiglu = shape.activation == Activation::kSwiglu;
  return shape.rows >= 0 && shape.rows <= kMax && shape.in_features > 0 && shape.in_features <= kMax &&
         shape.out_features > 0 && shape.out_features <= kMax &&
         (swiglu ? shape.out_features % 2 == 0 : shape.activation == Activation::kNone) &&
         (shape.dtype == DataType::kFloat32 || shape.dtype == DataType::kFloat16 || shape.dtype == DataType::kBFloat16);
}

// What the kernels that the rules may choose need at most. For few rows that is nothing.
int64_t workspace_by_rules(const GemmShape& shape) {
  int64_t bytes = 0;
  if (is_for_stream(shape)) return bytes;
  for (const GemmKernel& kernel : gemm_kernels()) bytes = std::max(bytes, kernel.workspace_bytes(shape));
  return bytes;
}

cudaError_t launch_by_rules(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  cudaError_t error = cudaErrorNotSupported;
  for (const GemmKernel& kernel : gemm_kernels()) {
    if (!kernel.takes(params, device, kOwnVariant) || !kernel.is_for(params, device)) continue;
    error = kernel.launch(params, device, kOwnVariant, stream);
    if (error != cudaErrorNotSupported) break;
  }
  return error;
}

}  // namespace

cudaError_t gemm_workspace_bytes(const GemmShape& shape, int64_t* bytes) {
  if (!is_valid(shape) || bytes == nullptr) return cudaErrorInvalidValue;
  *bytes = shape.rows == 0 ? 0 : workspace_by_rules(shape);
  return cudaSuccess;
}

cudaError_t launch_gemm(const GemmParams& given, cudaStream_t stream) {
  GemmParams params = given;
  if (!is_valid(params.shape)) return cudaErrorInvalidValue;
  if (params.shape.rows == 0) return cudaSuccess;
  if (params.x == nullptr || params.weight == nullptr || params.y == nullptr) return cudaErrorInvalidValue;
  if (params.shape.rows == 1) params.x_row_stride = params.shape.in_features;
  if (params.x_row_stride < params.shape.in_features) return cudaErrorInvalidValue;
  const int64_t bytes = workspace_by_rules(params.shape);
  if (bytes > 0 && (params.workspace == nullptr || params.workspace_bytes < bytes)) return cudaErrorInvalidValue;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return launch_by_rules(params, device, stream);
}

bool has_hopper_kernels() {
#ifdef QWEN_PLUGINS_HOPPER
  return true;
#else
  return false;
#endif
}

}  // namespace qwen_plugins
