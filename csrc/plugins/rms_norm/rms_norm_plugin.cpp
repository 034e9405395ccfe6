#include "rms_norm_plugin.h"

#include "plugins/launch.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = RmsNormPlugin::Attributes;

struct RangeName {
  static constexpr char const* message = RmsNormPlugin::kName;
};

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  auto const weight_type = static_cast<nvinfer1::DataType>(attributes.weight_type_id);
  std::vector<TensorRole> inputs{{"x", type, TensorShape::kRows}, {"weight", weight_type, TensorShape::kChannels}};
  std::vector<TensorRole> outputs{{"y", type, TensorShape::kRows}};
  if (attributes.residual != 0) {
    inputs.push_back({"residual", type, TensorShape::kRows});
    outputs.push_back({"x + residual", type, TensorShape::kRows});
  }
  return {inputs, outputs};
}

}  // namespace

AttributeSpecs const& RmsNormPlugin::attribute_specs() {
  static AttributeSpecs const specs{
      {"eps", PluginFieldType::kFLOAT32, offsetof(Attributes, eps), false},
      {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
      {"weight_type_id", PluginFieldType::kINT32, offsetof(Attributes, weight_type_id), false},
      {"residual", PluginFieldType::kINT32, offsetof(Attributes, residual), false},
      {"unit_offset", PluginFieldType::kINT32, offsetof(Attributes, unit_offset), false},
      {"round_before_weight", PluginFieldType::kINT32, offsetof(Attributes, round_before_weight), false},
  };
  return specs;
}

Attributes RmsNormPlugin::checked(Attributes attributes) {
  require_positive("eps", attributes.eps);
  require_type("type_id", attributes.type_id, floating_types());
  if (attributes.weight_type_id == -1) {
    attributes.weight_type_id = attributes.type_id;
  }
  require_type("weight_type_id", attributes.weight_type_id,
               {nvinfer1::DataType::kFLOAT, static_cast<nvinfer1::DataType>(attributes.type_id)});
  require_flag("residual", attributes.residual);
  require_flag("unit_offset", attributes.unit_offset);
  require_flag("round_before_weight", attributes.round_before_weight);
  return attributes;
}

RmsNormPlugin::RmsNormPlugin(Attributes const& attributes)
    : attributes_(checked(attributes)), roles_(make_roles(attributes_)) {}

void RmsNormPlugin::enqueue(nvinfer1::PluginTensorDesc const* input_descs, void const* const* inputs,
                            void* const* outputs, cudaStream_t stream) const {
  roles_.check_inputs(input_descs, roles_.input_count());
  RmsNormParams params;
  set_rows(TensorRoles::rows_of(input_descs[0]), params);
  set_attributes(attributes_, params);
  params.x = inputs[0];
  params.weight = inputs[1];
  params.y = outputs[0];
  params.y_strides = params.x_strides;
  params.round_before_weight = attributes_.round_before_weight != 0;
  if (attributes_.residual != 0) {
    params.residual = inputs[2];
    params.residual_out = outputs[1];
  }
  launch_in_range<RangeName>(params, launch_rms_norm, stream);
}

}  // namespace qwen_plugins
