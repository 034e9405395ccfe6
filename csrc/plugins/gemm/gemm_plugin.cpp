#include "gemm_plugin.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = GemmAttributes;

bool has_swiglu(Attributes const& attributes) {
  return attributes.activation == static_cast<int32_t>(Activation::kSwiglu);
}

Attributes checked(Attributes attributes) {
  require_type("type_id", attributes.type_id, floating_types());
  require_flag("bias", attributes.bias);
  require_one_of("activation", attributes.activation,
                 {static_cast<int32_t>(Activation::kNone), static_cast<int32_t>(Activation::kSwiglu)});
  require_flag("constant_weight", attributes.constant_weight);
  return attributes;
}

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  // With SwiGLU a column of y takes two rows of the weight.
  Dimension const out_features(has_swiglu(attributes) ? 2 : 1, "columns");
  std::vector<TensorRole> inputs{{"x", type, {"...", "in_features"}}, {"weight", type, {out_features, "in_features"}}};
  if (attributes.bias != 0) {
    inputs.push_back({"bias", type, {out_features}});
  }
  return {inputs, {{"y", type, {"...", "columns"}}}};
}

std::string description(GemmShape const& shape) {
  return std::to_string(shape.rows) + " rows of " + std::to_string(shape.in_features) + " times [" +
         std::to_string(shape.out_features) + ", " + std::to_string(shape.in_features) + "]";
}

size_t needed_workspace(GemmShape const& shape) {
  int64_t bytes = 0;
  check_cuda(gemm_workspace_bytes(shape, GemmChoice::kByRules, &bytes),
             [&] { return "workspace of " + description(shape); });
  return static_cast<size_t>(bytes);
}

}  // namespace

AttributeSchema const& GemmPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      1,
      {
          {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
          {"bias", PluginFieldType::kINT32, offsetof(Attributes, bias), false},
          {"activation", PluginFieldType::kINT32, offsetof(Attributes, activation), false},
          {"constant_weight", PluginFieldType::kINT32, offsetof(Attributes, constant_weight), false},
      }};
  return schema;
}

GemmPlugin::GemmPlugin(Attributes const& attributes) : PluginBase(checked(attributes), make_roles) {}

GemmShape GemmPlugin::shape(Sizes const& sizes) const {
  GemmShape shape;
  shape.rows = sizes.leading();
  shape.in_features = sizes["in_features"];
  shape.out_features = sizes["columns"] * (has_swiglu(attributes()) ? 2 : 1);
  shape.activation = static_cast<Activation>(attributes().activation);
  shape.dtype = static_cast<DataType>(attributes().type_id);
  return shape;
}

size_t GemmPlugin::workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const {
  GemmShape largest = shape(roles().largest_sizes(largest_inputs));
  // Few rows need a workspace, too, where in_features is no multiple of 8; at run time it may be smaller than here, and
  // not aligned.
  largest.in_features = 1;
  return needed_workspace(largest);
}

void GemmPlugin::enqueue(Execution const& execution) const {
  GemmParams params;
  params.shape = shape(roles().sizes(execution.input_descs));
  if (params.shape.rows == 0) {
    return;
  }
  params.x = input(execution, "x");
  params.weight = input(execution, "weight");
  params.bias = input(execution, "bias");
  params.y = output(execution, "y");
  params.x_row_stride = params.shape.in_features;
  params.constant_weight = attributes().constant_weight != 0;
  params.workspace = execution.workspace;
  // TensorRT does not pass the size. It granted workspace_bytes() of the largest shapes, which is at least this.
  params.workspace_bytes = static_cast<int64_t>(needed_workspace(params.shape));
  check_cuda(launch_gemm(params, execution.stream), [&] { return "launch of " + description(params.shape); });
}

}  // namespace qwen_plugins
