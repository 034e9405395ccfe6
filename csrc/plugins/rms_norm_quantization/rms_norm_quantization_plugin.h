// The RmsNormQuantization plug-in for every version of TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>

#include "plugins/plugin_base.h"

namespace qwen_plugins {

struct RmsNormQuantizationAttributes {
  float eps = 1e-6F;
  int32_t type_id = -1;
  int32_t weight_type_id = -1;  // -1: type_id
  int32_t dyn_act_scaling = 1;
  int32_t out_type_id = static_cast<int32_t>(nvinfer1::DataType::kINT8);
  int32_t residual = 0;
  int32_t smoothing = 0;
  int32_t smoothing_type_id = static_cast<int32_t>(nvinfer1::DataType::kFLOAT);
  int32_t unit_offset = 0;
  int32_t int32_output = 0;  // q is int32 to TensorRT, four codes in each number
};

class RmsNormQuantizationPlugin : public PluginBase<RmsNormQuantizationAttributes> {
 public:
  static constexpr char const* kName = "RmsNormQuantization";
  static constexpr char const* kVersion = "1";
  static AttributeSchema const& schema();

  explicit RmsNormQuantizationPlugin(Attributes const& attributes);

  // Launches the kernels for tensors of these shapes; zero rows launch nothing.
  void enqueue(Execution const& execution) const;
};

}  // namespace qwen_plugins
