// The Gemm plug-in's version 2, whose weight is quantized, for every version of TensorRT. README.md has its inputs,
// outputs and attributes.
#pragma once

#include <cstdint>

#include "gemm_common.h"

namespace qwen_plugins {

struct QuantizedGemmAttributes {
  int32_t type_id = -1;
  int32_t in_features = 0;
  int32_t out_features = 0;
  int32_t weight_bits = 0;
  int32_t group_size = 0;
  int32_t zeros = 0;
  int32_t scale_type_id = static_cast<int32_t>(DataType::kFloat16);
  int32_t bias = 0;
  int32_t activation = static_cast<int32_t>(Activation::kNone);
  int32_t constant_weight = 0;  // right for any network
  Int32Array kernels;           // pairs of a number of rows and the GemmChoice for up to so many
};

class QuantizedGemmPlugin : public GemmPluginBase<QuantizedGemmAttributes> {
 public:
  static constexpr char const* kName = "Gemm";
  static constexpr char const* kVersion = "2";
  static AttributeSchema const& schema();

  explicit QuantizedGemmPlugin(Attributes const& attributes);
};

}  // namespace qwen_plugins
