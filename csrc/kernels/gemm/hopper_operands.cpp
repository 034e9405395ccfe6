#include "hopper_operands.h"

#include "kernels/common/tensor_map.h"

namespace qwen_plugins {

bool can_use_tma(const GemmParams& params, const DeviceProperties& device) {
  const GemmShape& shape = params.shape;
  const auto addresses = reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight) |
                         reinterpret_cast<uintptr_t>(params.y);
  return device.major == 9 && !is_quantized(shape.weight_format) && shape.dtype != DataType::kFloat32 &&
         addresses % 16 == 0 && shape.in_features % 8 == 0 && params.x_row_stride % 8 == 0 &&
         columns_of(shape) % 8 == 0;
}

bool encode_weight_tensor_map(CUtensorMap& tensor_map, const GemmParams& params, int box_rows) {
  const GemmShape& shape = params.shape;
  const auto in_features = static_cast<cuuint64_t>(shape.in_features);
  const auto out_features = static_cast<cuuint64_t>(shape.out_features);
  const auto rows = static_cast<cuuint32_t>(box_rows);
  const cuuint64_t row_bytes = 2 * in_features;
  if (shape.activation == Activation::kSwiglu) {
    return encode_tensor_map(tensor_map, shape.dtype, params.weight, {in_features, 8, 2, out_features / 16},
                             {row_bytes, row_bytes * (out_features / 2), row_bytes * 8}, {kBlockK, 8, 2, rows / 16});
  }
  const cuuint64_t all_bytes = row_bytes * out_features;
  return encode_tensor_map(tensor_map, shape.dtype, params.weight, {in_features, out_features, 1, 1},
                           {row_bytes, all_bytes, all_bytes}, {kBlockK, rows, 1, 1});
}

bool encode_x_tensor_map(CUtensorMap& tensor_map, const GemmParams& params, int box_rows) {
  const GemmShape& shape = params.shape;
  return encode_tensor_map(tensor_map, shape.dtype, params.x,
                           {static_cast<cuuint64_t>(shape.in_features), static_cast<cuuint64_t>(shape.rows)},
                           {static_cast<cuuint64_t>(2 * params.x_row_stride)},
                           {kBlockK, static_cast<cuuint32_t>(box_rows)});
}

}  // namespace qwen_plugins
