#include "quantize_plugin.h"

#include "kernels/quantize/quantize.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = QuantizeAttributes;

Attributes checked(Attributes const& attributes) {
  require_type("type_id", attributes.type_id, floating_types());
  require_flag("int32_output", attributes.int32_output);
  require_type("out_type_id", attributes.out_type_id, code_types(attributes.int32_output != 0));
  return attributes;
}

// The columns of x that one element of q stands for, and what the last dimension of q is called.
int32_t codes_of_element(Attributes const& attributes) { return attributes.int32_output != 0 ? kCodesOfInt32 : 1; }
char const* size_name(Attributes const& attributes) { return attributes.int32_output != 0 ? "words" : "columns"; }

TensorRole x_role(Attributes const& attributes) {
  return {"x",
          static_cast<nvinfer1::DataType>(attributes.type_id),
          {"...", Dimension(codes_of_element(attributes), size_name(attributes))}};
}

TensorRole q_role(Attributes const& attributes) {
  bool const is_int32 = attributes.int32_output != 0;
  return {"q",
          is_int32 ? nvinfer1::DataType::kINT32 : static_cast<nvinfer1::DataType>(attributes.out_type_id),
          {"...", size_name(attributes)}};
}

std::vector<SizeLimit> limits(Attributes const& attributes) {
  return {{"...", 0, kMaxInt32}, {size_name(attributes), 1, kMaxInt32 / codes_of_element(attributes)}};
}

TensorRoles roles_per_token(Attributes const& attributes) {
  TensorRole const scales{"scales", nvinfer1::DataType::kFLOAT, {"...", 1}};
  return {{x_role(attributes)}, {q_role(attributes), scales}, limits(attributes)};
}

TensorRoles roles_of_tensor(Attributes const& attributes) {
  TensorRole const scale{"scale", nvinfer1::DataType::kFLOAT, {1}, true};
  return {{x_role(attributes), scale}, {q_role(attributes)}, limits(attributes)};
}

AttributeSchema schema_of(char const* plugin) {
  return {plugin,
          1,
          {
              {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
              {"out_type_id", PluginFieldType::kINT32, offsetof(Attributes, out_type_id), false},
              {"int32_output", PluginFieldType::kINT32, offsetof(Attributes, int32_output), false},
          }};
}

}  // namespace

QuantizePlugin::QuantizePlugin(Attributes const& attributes, TensorRoles (*make_roles)(Attributes const&))
    : PluginBase(checked(attributes), make_roles) {}

AttributeSchema const& QuantizePerTokenPlugin::schema() {
  static AttributeSchema const schema = schema_of(kName);
  return schema;
}

QuantizePerTokenPlugin::QuantizePerTokenPlugin(Attributes const& attributes)
    : QuantizePlugin(attributes, roles_per_token) {}

AttributeSchema const& QuantizeTensorPlugin::schema() {
  static AttributeSchema const schema = schema_of(kName);
  return schema;
}

QuantizeTensorPlugin::QuantizeTensorPlugin(Attributes const& attributes)
    : QuantizePlugin(attributes, roles_of_tensor) {}

void QuantizePlugin::enqueue(Execution const& execution) const {
  Sizes const sizes = roles().sizes(execution.input_descs);
  QuantizeParams params;
  params.x = input(execution, "x");
  params.rows = sizes.leading();
  params.columns = sizes[size_name(attributes())] * codes_of_element(attributes());
  params.x_row_stride = params.columns;
  params.dtype = static_cast<DataType>(attributes().type_id);
  params.quant_dtype = static_cast<DataType>(attributes().out_type_id);
  params.static_scale = static_cast<float const*>(input(execution, "scale"));
  params.q = output(execution, "q");
  params.scales = static_cast<float*>(output(execution, "scales"));
  if (params.rows == 0) {
    return;
  }
  check_cuda(launch_quantize(params, execution.stream),
             [&] { return "launch of " + std::to_string(params.rows) + " rows of " + std::to_string(params.columns); });
}

}  // namespace qwen_plugins
