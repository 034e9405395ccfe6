// The RmsNormQuantization plug-in, whatever the TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>

#include "kernels/rms_norm.h"
#include "plugins/attributes.h"
#include "plugins/tensor_roles.h"

namespace qwen_plugins {

class RmsNormQuantizationPlugin {
 public:
  struct Attributes {
    float eps = 1e-6F;
    int32_t type_id = -1;
    int32_t weight_type_id = -1;  // -1: type_id
    int32_t dyn_act_scaling = 1;
    int32_t out_type_id = static_cast<int32_t>(nvinfer1::DataType::kINT8);
    int32_t residual = 0;
    int32_t smoothing = 0;
    int32_t smoothing_type_id = static_cast<int32_t>(nvinfer1::DataType::kFLOAT);
    int32_t unit_offset = 0;
  };

  static constexpr char const* kName = "RmsNormQuantization";
  static AttributeSpecs const& attribute_specs();
  // Replaces defaults by what they stand for, and throws std::invalid_argument for values that make no sense.
  static Attributes checked(Attributes attributes);

  explicit RmsNormQuantizationPlugin(Attributes const& attributes);

  Attributes const& attributes() const { return attributes_; }
  TensorRoles const& roles() const { return roles_; }

  // The launch for tensors of these shapes; zero rows launch nothing.
  void enqueue(nvinfer1::PluginTensorDesc const* input_descs, void const* const* inputs, void* const* outputs,
               cudaStream_t stream) const;

 private:
  Attributes attributes_;
  TensorRoles roles_;
};

}  // namespace qwen_plugins
