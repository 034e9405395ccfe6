#include "rms_norm_quantization_plugin.h"

#include "plugins/launch.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = RmsNormQuantizationPlugin::Attributes;

struct RangeName {
  static constexpr char const* message = RmsNormQuantizationPlugin::kName;
};

// int8, and float8 where this TensorRT passes it between layers.
std::vector<nvinfer1::DataType> quantized_types() {
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  return {nvinfer1::DataType::kINT8, nvinfer1::DataType::kFP8};
#else
  return {nvinfer1::DataType::kINT8};
#endif
}

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  auto const weight_type = static_cast<nvinfer1::DataType>(attributes.weight_type_id);
  auto const out_type = static_cast<nvinfer1::DataType>(attributes.out_type_id);
  auto const smoothing_type = static_cast<nvinfer1::DataType>(attributes.smoothing_type_id);
  std::vector<TensorRole> inputs{{"x", type, TensorShape::kRows}, {"weight", weight_type, TensorShape::kChannels}};
  std::vector<TensorRole> outputs{{"q", out_type, TensorShape::kRows}};
  if (attributes.residual != 0) {
    inputs.push_back({"residual", type, TensorShape::kRows});
  }
  if (attributes.dyn_act_scaling != 0) {
    outputs.push_back({"scales", nvinfer1::DataType::kFLOAT, TensorShape::kPerRow});
  } else {
    inputs.push_back({"scale", nvinfer1::DataType::kFLOAT, TensorShape::kPerTensor});
  }
  if (attributes.smoothing != 0) {
    inputs.push_back({"smoothing", smoothing_type, TensorShape::kChannels});
  }
  if (attributes.residual != 0) {
    outputs.push_back({"x + residual", type, TensorShape::kRows});
  }
  return {inputs, outputs};
}

}  // namespace

AttributeSpecs const& RmsNormQuantizationPlugin::attribute_specs() {
  static AttributeSpecs const specs{
      {"eps", PluginFieldType::kFLOAT32, offsetof(Attributes, eps), false},
      {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
      {"weight_type_id", PluginFieldType::kINT32, offsetof(Attributes, weight_type_id), false},
      {"dyn_act_scaling", PluginFieldType::kINT32, offsetof(Attributes, dyn_act_scaling), true},
      {"out_type_id", PluginFieldType::kINT32, offsetof(Attributes, out_type_id), false},
      {"residual", PluginFieldType::kINT32, offsetof(Attributes, residual), false},
      {"smoothing", PluginFieldType::kINT32, offsetof(Attributes, smoothing), false},
      {"smoothing_type_id", PluginFieldType::kINT32, offsetof(Attributes, smoothing_type_id), false},
      {"unit_offset", PluginFieldType::kINT32, offsetof(Attributes, unit_offset), false},
  };
  return specs;
}

Attributes RmsNormQuantizationPlugin::checked(Attributes attributes) {
  require_positive("eps", attributes.eps);
  require_type("type_id", attributes.type_id, floating_types());
  if (attributes.weight_type_id == -1) {
    attributes.weight_type_id = attributes.type_id;
  }
  std::vector<nvinfer1::DataType> const channel_types{nvinfer1::DataType::kFLOAT,
                                                      static_cast<nvinfer1::DataType>(attributes.type_id)};
  require_type("weight_type_id", attributes.weight_type_id, channel_types);
  require_type("smoothing_type_id", attributes.smoothing_type_id, channel_types);
  require_type("out_type_id", attributes.out_type_id, quantized_types());
  require_flag("dyn_act_scaling", attributes.dyn_act_scaling);
  require_flag("residual", attributes.residual);
  require_flag("smoothing", attributes.smoothing);
  require_flag("unit_offset", attributes.unit_offset);
  return attributes;
}

RmsNormQuantizationPlugin::RmsNormQuantizationPlugin(Attributes const& attributes)
    : attributes_(checked(attributes)), roles_(make_roles(attributes_)) {}

void RmsNormQuantizationPlugin::enqueue(nvinfer1::PluginTensorDesc const* input_descs, void const* const* inputs,
                                        void* const* outputs, cudaStream_t stream) const {
  roles_.check_inputs(input_descs, roles_.input_count());
  RmsNormQuantParams params;
  set_rows(TensorRoles::rows_of(input_descs[0]), params);
  set_attributes(attributes_, params);
  params.quant_dtype = static_cast<DataType>(attributes_.out_type_id);
  params.smoothing_dtype = static_cast<DataType>(attributes_.smoothing_type_id);
  // The optional tensors follow in the order of make_roles.
  int32_t next_input = 0;
  int32_t next_output = 0;
  params.x = inputs[next_input++];
  params.weight = inputs[next_input++];
  params.q = outputs[next_output++];
  if (attributes_.residual != 0) {
    params.residual = inputs[next_input++];
  }
  if (attributes_.dyn_act_scaling != 0) {
    params.scales = static_cast<float*>(outputs[next_output++]);
  } else {
    params.static_scale = static_cast<float const*>(inputs[next_input++]);
  }
  if (attributes_.smoothing != 0) {
    params.smoothing = inputs[next_input++];
  }
  if (attributes_.residual != 0) {
    params.residual_out = outputs[next_output++];
  }
  launch_in_range<RangeName>(params, launch_rms_norm_quant, stream);
}

}  // namespace qwen_plugins
