#include "gemm_kernel.h"

#include "cublas_lt_gemm.h"
#include "plain.h"
#include "stream.h"
#include "stream_hopper.h"
#include "tiles_hopper.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kPackBytes = 16;

}  // namespace

const std::vector<GemmKernel>& gemm_kernels() {
  static const std::vector<GemmKernel> kernels{
      stream_kernel(),
#ifdef QWEN_PLUGINS_HOPPER
      stream_hopper_kernel(),
      tiles_hopper_kernel(),
#endif
      cublas_lt_kernel(),
      // Without cuBLASLt:
      stream_in_parts_kernel(),
      plain_kernel(),
  };
  return kernels;
}

GemmParams rows_of(const GemmParams& params, int64_t first, int64_t count) {
  const int64_t size = size_of(params.shape.dtype);
  GemmParams part = params;
  part.shape.rows = count;
  part.x = static_cast<const char*>(params.x) + first * params.x_row_stride * size;
  part.y = static_cast<char*>(params.y) + first * columns_of(params.shape) * size;
  return part;
}

bool is_in_packs(const GemmShape& shape) {
  return shape.dtype != DataType::kFloat32 && shape.in_features * size_of(shape.dtype) % kPackBytes == 0;
}

bool is_aligned(const GemmParams& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                    static_cast<uintptr_t>(p.x_row_stride * size_of(p.shape.dtype));
  return bits % kPackBytes == 0;
}

}  // namespace qwen_plugins
