// The Gemm plug-in for every version of TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>

#include "gemm_common.h"

namespace qwen_plugins {

struct GemmAttributes {
  int32_t type_id = -1;
  int32_t bias = 0;
  int32_t activation = static_cast<int32_t>(Activation::kNone);
  int32_t constant_weight = 0;  // right for any network
  Int32Array kernels;           // pairs of a number of rows and the GemmChoice for up to so many
};

class GemmPlugin : public GemmPluginBase<GemmAttributes> {
 public:
  static constexpr char const* kName = "Gemm";
  static constexpr char const* kVersion = "1";
  static AttributeSchema const& schema();

  explicit GemmPlugin(Attributes const& attributes);

  size_t workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const;
};

}  // namespace qwen_plugins
