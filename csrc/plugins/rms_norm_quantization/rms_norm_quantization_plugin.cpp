#include "rms_norm_quantization_plugin.h"

#include "plugins/rms_norm/rms_norm_common.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = RmsNormQuantizationAttributes;

// int8, and float8 where this TensorRT passes it between layers.
std::vector<nvinfer1::DataType> quantized_types() {
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  return {nvinfer1::DataType::kINT8, nvinfer1::DataType::kFP8};
#else
  return {nvinfer1::DataType::kINT8};
#endif
}

Attributes checked(Attributes attributes) {
  check_rms_norm_attributes(attributes);
  require_type("smoothing_type_id", attributes.smoothing_type_id,
               {nvinfer1::DataType::kFLOAT, static_cast<nvinfer1::DataType>(attributes.type_id)});
  require_type("out_type_id", attributes.out_type_id, quantized_types());
  require_flag("dyn_act_scaling", attributes.dyn_act_scaling);
  require_flag("smoothing", attributes.smoothing);
  return attributes;
}

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  auto const weight_type = static_cast<nvinfer1::DataType>(attributes.weight_type_id);
  auto const out_type = static_cast<nvinfer1::DataType>(attributes.out_type_id);
  auto const smoothing_type = static_cast<nvinfer1::DataType>(attributes.smoothing_type_id);
  Pattern const rows{"...", "hidden_size"};
  std::vector<TensorRole> inputs{{"x", type, rows}, {"weight", weight_type, {"hidden_size"}}};
  std::vector<TensorRole> outputs{{"q", out_type, rows}};
  if (attributes.residual != 0) {
    inputs.push_back({"residual", type, rows});
  }
  if (attributes.dyn_act_scaling != 0) {
    outputs.push_back({"scales", nvinfer1::DataType::kFLOAT, {"...", 1}});
  } else {
    inputs.push_back({"scale", nvinfer1::DataType::kFLOAT, {1}, true});
  }
  if (attributes.smoothing != 0) {
    inputs.push_back({"smoothing", smoothing_type, {"hidden_size"}});
  }
  if (attributes.residual != 0) {
    outputs.push_back({"x + residual", type, rows});
  }
  return {inputs, outputs, rms_norm_limits(attributes.dyn_act_scaling != 0 ? 1 : 0)};
}

}  // namespace

AttributeSchema const& RmsNormQuantizationPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      1,
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
      }};
  return schema;
}

RmsNormQuantizationPlugin::RmsNormQuantizationPlugin(Attributes const& attributes)
    : PluginBase(checked(attributes), make_roles) {}

void RmsNormQuantizationPlugin::enqueue(Execution const& execution) const {
  RmsNormQuantParams params;
  set_rms_norm_params(attributes(), roles().sizes(execution.input_descs), params);
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
