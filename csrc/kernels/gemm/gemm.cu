#include <algorithm>
#include <limits>

#include "cublas_lt_gemm.h"
#include "gemm.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/launch.h"
#include "plain.h"
#include "stream.h"
#include "stream_hopper.h"
#include "swiglu.h"
#include "tiles_hopper.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kAlignment = 16;  // bytes, of what gemm_stream reads
// Rows that one call of cuBLASLt computes where SwiGLU follows: more are no faster, and z takes more workspace.
constexpr int64_t kMaxSwigluRows = 8192;

bool is_valid(const GemmShape& shape) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  const bool swiglu = shape.activation == Activation::kSwiglu;
  return shape.rows >= 0 && shape.rows <= kMax && shape.in_features > 0 && shape.in_features <= kMax &&
         shape.out_features > 0 && shape.out_features <= kMax &&
         (swiglu ? shape.out_features % 2 == 0 : shape.activation == Activation::kNone) &&
         (shape.dtype == DataType::kFloat32 || shape.dtype == DataType::kFloat16 || shape.dtype == DataType::kBFloat16);
}

// Whether gemm_stream can compute this shape, given aligned addresses.
bool is_streamable(const GemmShape& shape) {
  return shape.dtype != DataType::kFloat32 && shape.in_features * size_of(shape.dtype) % kAlignment == 0;
}

// Whether gemm_stream is also no slower than cuBLASLt for this shape (measured on an H200: docs/gemm.md).
bool is_for_stream(const GemmShape& shape) { return is_streamable(shape) && shape.rows <= kMaxStreamedRows; }

bool is_aligned(const GemmParams& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                    static_cast<uintptr_t>(p.shape.rows > 1 ? p.x_row_stride * size_of(p.shape.dtype) : 0);
  return bits % kAlignment == 0;
}

// The GEMM of rows [first, first + count) alone.
GemmParams rows_of(const GemmParams& params, int64_t first, int64_t count) {
  const int64_t size = size_of(params.shape.dtype);
  GemmParams part = params;
  part.shape.rows = count;
  part.x = static_cast<const char*>(params.x) + first * params.x_row_stride * size;
  part.y = static_cast<char*>(params.y) + first * columns_of(params.shape) * size;
  return part;
}

// cudaErrorNotSupported, with nothing launched, where no kernel for Hopper takes this GEMM.
cudaError_t launch_on_hopper([[maybe_unused]] const GemmParams& p, [[maybe_unused]] cudaStream_t stream) {
#ifdef QWEN_PLUGINS_HOPPER
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  if (takes_gemm_stream_hopper(p, device)) return launch_gemm_stream_hopper(p, device, stream);
  if (takes_gemm_tiles_hopper(p, device)) return launch_gemm_tiles_hopper(p, device, stream);
#endif
  return cudaErrorNotSupported;
}

cudaError_t launch_swiglu_with_cublas_lt(const GemmParams& p, cudaStream_t stream) {
  SwigluParams swiglu;
  void* z = static_cast<char*>(p.workspace) + kCublasLtWorkspaceBytes;
  swiglu.gate_up = z;
  swiglu.y = p.y;
  swiglu.gate_up_row_stride = p.shape.out_features;
  swiglu.rows = p.shape.rows;
  swiglu.size = p.shape.out_features / 2;
  swiglu.dtype = p.shape.dtype;
  const cudaError_t error = launch_gemm_cublas_lt(p, z, p.workspace, stream);
  return error == cudaSuccess ? launch_swiglu(swiglu, stream) : error;
}

cudaError_t launch_with_cublas_lt(const GemmParams& p, cudaStream_t stream) {
  if (p.shape.activation == Activation::kNone) return launch_gemm_cublas_lt(p, p.y, p.workspace, stream);
  const int64_t parts = divide_up(p.shape.rows, kMaxSwigluRows);
  const int64_t rows = divide_up(p.shape.rows, parts);  // as even as possible: each part reads the whole weight
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < p.shape.rows && error == cudaSuccess; row += rows) {
    error = launch_swiglu_with_cublas_lt(rows_of(p, row, std::min(rows, p.shape.rows - row)), stream);
  }
  return error;
}

// Launches the kernels that run on every device: gemm_stream, kMaxStreamedRows rows at a time, or gemm_plain.
cudaError_t launch_own_kernels(const GemmParams& p, cudaStream_t stream) {
  if (!is_streamable(p.shape) || !is_aligned(p)) return launch_gemm_plain(p, stream);
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < p.shape.rows && error == cudaSuccess; row += kMaxStreamedRows) {
    const GemmParams part = rows_of(p, row, std::min(kMaxStreamedRows, p.shape.rows - row));
    error = p.shape.dtype == DataType::kFloat16 ? launch_gemm_stream_float16(part, stream)
                                                : launch_gemm_stream_bfloat16(part, stream);
  }
  return error;
}

}  // namespace

cudaError_t gemm_workspace_bytes(const GemmShape& shape, int64_t* bytes) {
  if (!is_valid(shape) || bytes == nullptr) return cudaErrorInvalidValue;
  *bytes = 0;
  if (shape.rows == 0 || is_for_stream(shape)) return cudaSuccess;
  *bytes = kCublasLtWorkspaceBytes;
  if (shape.activation == Activation::kSwiglu) {
    *bytes += std::min(shape.rows, kMaxSwigluRows) * shape.out_features * size_of(shape.dtype);
  }
  return cudaSuccess;
}

cudaError_t launch_gemm(const GemmParams& p, cudaStream_t stream) {
  if (!is_valid(p.shape)) return cudaErrorInvalidValue;
  if (p.shape.rows == 0) return cudaSuccess;
  if (p.x == nullptr || p.weight == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  if (p.shape.rows > 1 && p.x_row_stride < p.shape.in_features) return cudaErrorInvalidValue;
  if (is_for_stream(p.shape)) return launch_own_kernels(p, stream);
  int64_t bytes = 0;
  if (const cudaError_t error = gemm_workspace_bytes(p.shape, &bytes); error != cudaSuccess) return error;
  if (p.workspace == nullptr || p.workspace_bytes < bytes) return cudaErrorInvalidValue;
  cudaError_t error = launch_on_hopper(p, stream);
  if (error == cudaErrorNotSupported) error = launch_with_cublas_lt(p, stream);
  return error == cudaErrorNotSupported ? launch_own_kernels(p, stream) : error;
}

bool has_hopper_kernels() {
#ifdef QWEN_PLUGINS_HOPPER
  return true;
#else
  return false;
#endif
}

}  // namespace qwen_plugins
