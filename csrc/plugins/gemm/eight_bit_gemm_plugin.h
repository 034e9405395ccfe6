// The Gemm plug-in's version 3, whose x and weight are codes of 8 bits, for every version of TensorRT. README.md has
// its inputs, outputs and attributes.
#pragma once

#include <cstdint>

#include "gemm_common.h"

namespace qwen_plugins {

struct EightBitGemmAttributes {
  int32_t type_id = -1;    // of bias and y
  int32_t x_type_id = -1;  // of the codes of x and of the weight
  int32_t in_features = 0;
  int32_t out_features = 0;
  int32_t group_size = 0;
  int32_t has_per_token_scaling = 0;
  int32_t quantize_output = 0;  // y is codes of the type of x
  int32_t bias = 0;
  int32_t activation = static_cast<int32_t>(Activation::kNone);
  int32_t constant_weight = 0;  // right for any network
  Int32Array kernels;           // pairs of a number of rows and the GemmChoice for up to so many
};

class EightBitGemmPlugin : public GemmPluginBase<EightBitGemmAttributes> {
 public:
  static constexpr char const* kName = "Gemm";
  static constexpr char const* kVersion = "3";
  static AttributeSchema const& schema();

  explicit EightBitGemmPlugin(Attributes const& attributes);
};

}  // namespace qwen_plugins
