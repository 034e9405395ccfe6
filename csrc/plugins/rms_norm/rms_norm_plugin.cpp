#include "rms_norm_plugin.h"

#include "plugins/rms_norm/rms_norm_common.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = RmsNormAttributes;

Attributes checked(Attributes attributes) {
  check_rms_norm_attributes(attributes);
  require_flag("round_before_weight", attributes.round_before_weight);
  return attributes;
}

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  auto const weight_type = static_cast<nvinfer1::DataType>(attributes.weight_type_id);
  Pattern const rows{"...", "hidden_size"};
  std::vector<TensorRole> inputs{{"x", type, rows}, {"weight", weight_type, {"hidden_size"}}};
  std::vector<TensorRole> outputs{{"y", type, rows}};
  if (attributes.residual != 0) {
    inputs.push_back({"residual", type, rows});
    outputs.push_back({"x + residual", type, rows});
  }
  return {inputs, outputs, rms_norm_limits(0)};
}

}  // namespace

AttributeSchema const& RmsNormPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      1,
      {
          {"eps", PluginFieldType::kFLOAT32, offsetof(Attributes, eps), false},
          {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
          {"weight_type_id", PluginFieldType::kINT32, offsetof(Attributes, weight_type_id), false},
          {"residual", PluginFieldType::kINT32, offsetof(Attributes, residual), false},
          {"unit_offset", PluginFieldType::kINT32, offsetof(Attributes, unit_offset), false},
          {"round_before_weight", PluginFieldType::kINT32, offsetof(Attributes, round_before_weight), false},
      }};
  return schema;
}

RmsNormPlugin::RmsNormPlugin(Attributes const& attributes) : PluginBase(checked(attributes), make_roles) {}

void RmsNormPlugin::enqueue(Execution const& execution) const {
  RmsNormParams params;
  Sizes const sizes = roles().sizes(execution.input_descs);
  set_rms_norm_params(attributes(), sizes.leading(), sizes["hidden_size"], params);
  params.x = input(execution, "x");
  params.weight = input(execution, "weight");
  params.residual = input(execution, "residual");
  params.residual_out = output(execution, "x + residual");
  params.y = output(execution, "y");
  params.y_strides = params.x_strides;
  params.round_before_weight = attributes().round_before_weight != 0;
  launch_rows(params, launch_rms_norm, execution.stream);
}

}  // namespace qwen_plugins
