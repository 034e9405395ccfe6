#include "rms_norm_quantization_plugin.h"

#include "plugins/rms_norm/rms_norm_common.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = RmsNormQuantizationAttributes;

Attributes checked(Attributes attributes) {
  check_rms_norm_attributes(attributes);
  require_type("smoothing_type_id", attributes.smoothing_type_id,
               {nvinfer1::DataType::kFLOAT, static_cast<nvinfer1::DataType>(attributes.type_id)});
  require_flag("int32_output", attributes.int32_output);
  require_type("out_type_id", attributes.out_type_id, code_types(attributes.int32_output != 0));
  require_flag("dyn_act_scaling", attributes.dyn_act_scaling);
  require_flag("smoothing", attributes.smoothing);
  return attributes;
}

// What the last dimension of q is called.
char const* size_name(Attributes const& attributes) { return attributes.int32_output != 0 ? "words" : "hidden_size"; }

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  auto const weight_type = static_cast<nvinfer1::DataType>(attributes.weight_type_id);
  auto const smoothing_type = static_cast<nvinfer1::DataType>(attributes.smoothing_type_id);
  bool const int32_output = attributes.int32_output != 0;
  Dimension const hidden_size(int32_output ? kCodesOfInt32 : 1, size_name(attributes));
  Pattern const rows{"...", hidden_size};
  std::vector<TensorRole> inputs{{"x", type, rows}, {"weight", weight_type, {hidden_size}}};
  std::vector<TensorRole> outputs{
      {"q",
       int32_output ? nvinfer1::DataType::kINT32 : static_cast<nvinfer1::DataType>(attributes.out_type_id),
       {"...", size_name(attributes)}}};
  if (attributes.residual != 0) {
    inputs.push_back({"residual", type, rows});
  }
  if (attributes.dyn_act_scaling != 0) {
    outputs.push_back({"scales", nvinfer1::DataType::kFLOAT, {"...", 1}});
  } else {
    inputs.push_back({"scale", nvinfer1::DataType::kFLOAT, {1}, true});
  }
  if (attributes.smoothing != 0) {
    inputs.push_back({"smoothing", smoothing_type, {hidden_size}});
  }
  if (attributes.residual != 0) {
    outputs.push_back({"x + residual", type, rows});
  }
  std::vector<SizeLimit> limits = rms_norm_limits(attributes.dyn_act_scaling != 0 ? 1 : 0);
  if (int32_output) {
    limits.back() = {size_name(attributes), limits.back().least, limits.back().most / kCodesOfInt32};
  }
  return {inputs, outputs, limits};
}

}  // namespace

AttributeSchema const& RmsNormQuantizationPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      2,
      {
          {"eps", PluginFieldType::kFLOAT32, offsetof(Attributes, eps), false},
          {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
          {"weight_type_id", PluginFieldType::kINT32, offsetof(Attributes, weight_type_id), false},
          {"dyn_act_scaling", PluginFieldType::kINT32, offsetof(Attributes, dyn_act_scaling), true},
          {"out_type_id", PluginFieldType::kINT32, offsetof(Attributes, out_type_id), false},
          {"residual", PluginFieldType::kINT32, offsetof(Attributes, residual), false},
          {"smoothing", PluginFieldType::kINT32, offsetof(Attributes, smoothing), false},
          {"smoothing_type_id", PluginFieldType::kINT32, offsetof(Attributes, smoothing_type_id), false},
          {"unit_offset", PluginFieldType::kINT32, offsetof(Attributes, unit_offset), false},
          {"int32_output", PluginFieldType::kINT32, offsetof(Attributes, int32_output), false, false, 2},
      }};
  return schema;
}

RmsNormQuantizationPlugin::RmsNormQuantizationPlugin(Attributes const& attributes)
    : PluginBase(checked(attributes), make_roles) {}

void RmsNormQuantizationPlugin::enqueue(Execution const& execution) const {
  RmsNormQuantParams params;
  Sizes const sizes = roles().sizes(execution.input_descs);
  int64_t const hidden_size = sizes[size_name(attributes())] * (attributes().int32_output != 0 ? kCodesOfInt32 : 1);
  set_rms_norm_params(attributes(), sizes.leading(), hidden_size, params);
  params.quant_dtype = static_cast<DataType>(attributes().out_type_id);
  params.smoothing_dtype = static_cast<DataType>(attributes().smoothing_type_id);
  params.x = input(execution, "x");
  params.weight = input(execution, "weight");
  params.residual = input(execution, "residual");
  params.static_scale = static_cast<float const*>(input(execution, "scale"));
  params.smoothing = input(execution, "smoothing");
  params.q = output(execution, "q");
  params.scales = static_cast<float*>(output(execution, "scales"));
  params.residual_out = output(execution, "x + residual");
  launch_rows(params, launch_rms_norm_quant, execution.stream);
}

}  // namespace qwen_plugins
