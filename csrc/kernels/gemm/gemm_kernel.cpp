#include "gemm_kernel.h"

#include <algorithm>

#include "cublas_lt_eight_bit.h"
#include "cublas_lt_gemm.h"
#include "dequantized.h"
#include "plain.h"
#include "stream.h"
#include "stream_eight_bit.h"
#include "stream_hopper.h"
#include "stream_quantized.h"
#include "tiles_eight_bit.h"
#include "tiles_hopper.h"
#include "tiles_quantized.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kPackBytes = 16;

}  // namespace

const std::vector<GemmKernel>& gemm_kernels() {
  static const std::vector<GemmKernel> kernels{
#ifdef QWEN_PLUGINS_HOPPER
      stream_quantized_kernel(),
      stream_eight_bit_kernel(),
      stream_hopper_kernel(),
#endif
      stream_kernel(),
#ifdef QWEN_PLUGINS_HOPPER
      tiles_hopper_kernel(),
      tiles_quantized_kernel(),
      tiles_eight_bit_kernel(),
#endif
      dequantized_kernel(),
      cublas_lt_kernel(),
      cublas_lt_eight_bit_kernel(),
      // Without cuBLASLt:
      stream_in_parts_kernel(),
      plain_kernel(),
  };
  return kernels;
}

ChosenKernel find_kernel(GemmChoice choice) {
  const auto number = static_cast<int32_t>(choice);
  const int32_t variant = number & ((1 << kVariantBits) - 1);
  for (const GemmKernel& kernel : gemm_kernels()) {
    if (static_cast<int32_t>(kernel.id) != number >> kVariantBits) continue;
    const auto has_number = [&](const GemmVariant& known) { return known.id == variant; };
    const bool known =
        variant == kOwnVariant || std::any_of(kernel.variants.begin(), kernel.variants.end(), has_number);
    return {known ? &kernel : nullptr, variant};
  }
  return {nullptr, kOwnVariant};
}

const GemmKernel* next_by_rules(const GemmParams& params, const DeviceProperties& device, const GemmKernel* previous) {
  const std::vector<GemmKernel>& kernels = gemm_kernels();
  const GemmKernel* kernel = previous == nullptr ? kernels.data() : previous + 1;
  for (; kernel != kernels.data() + kernels.size(); ++kernel) {
    if (kernel->takes(params, device, kOwnVariant) && kernel->is_for(params, device)) return kernel;
  }
  return nullptr;
}

bool is_valid(const WeightFormat& format, int64_t in_features) {
  if (!is_quantized(format)) return true;
  const int32_t group = format.group_size;
  if (has_quantized_x(format)) {
    const bool is_int8 = format.kind == WeightKind::kInt8Rows;
    return (group == 0 || (group == 128 && !is_int8)) && !format.has_zeros &&
           format.scale_dtype == DataType::kFloat32 && !(is_int8 && in_features > kMaxInt8Inputs);
  }
  return is_packed(format) &&
         (group == 0 || ((group == 32 || group == 64 || group == 128) && in_features % group == 0)) &&
         (format.scale_dtype == DataType::kFloat16 || format.scale_dtype == DataType::kBFloat16);
}

bool is_valid(const GemmShape& shape) {
  const bool swiglu = shape.activation == Activation::kSwiglu;
  return shape.rows >= 0 && shape.rows <= kMaxGemmSize && shape.in_features > 0 && shape.in_features <= kMaxGemmSize &&
         shape.out_features > 0 && shape.out_features <= kMaxGemmSize &&
         (swiglu ? shape.out_features % 2 == 0 : shape.activation == Activation::kNone) &&
         (shape.dtype == DataType::kFloat32 || shape.dtype == DataType::kFloat16 ||
          shape.dtype == DataType::kBFloat16) &&
         is_valid(shape.weight_format, shape.in_features) &&
         (has_quantized_x(shape.weight_format) || !(shape.x_scale_per_row || shape.quantized_y));
}

GemmParams rows_of(const GemmParams& params, int64_t first, int64_t count) {
  const GemmShape& shape = params.shape;
  GemmParams part = params;
  part.shape.rows = count;
  part.x = static_cast<const char*>(params.x) + first * params.x_row_stride * size_of(x_type_of(shape));
  part.y = static_cast<char*>(params.y) + first * columns_of(shape) * size_of(y_type_of(shape));
  if (shape.x_scale_per_row) part.x_scales = params.x_scales + first;
  return part;
}

bool is_in_packs(const GemmShape& shape) {
  return !is_quantized(shape.weight_format) && shape.dtype != DataType::kFloat32 &&
         shape.in_features * size_of(shape.dtype) % kPackBytes == 0;
}

bool is_aligned(const GemmParams& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                    static_cast<uintptr_t>(p.x_row_stride * size_of(p.shape.dtype));
  return bits % kPackBytes == 0;
}

}  // namespace qwen_plugins
