#include "gemm_plugin.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = GemmAttributes;

Attributes checked(Attributes const& attributes) {
  check_gemm_attributes(attributes);
  return attributes;
}

TensorRoles make_roles(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  // With SwiGLU a column of y takes two rows of the weight.
  Dimension const out_features(is_swiglu(attributes.activation) ? 2 : 1, "columns");
  std::vector<TensorRole> inputs{{"x", type, {"...", "in_features"}}, {"weight", type, {out_features, "in_features"}}};
  if (attributes.bias != 0) {
    inputs.push_back({"bias", type, {out_features}});
  }
  return {
      inputs,
      {{"y", type, {"...", "columns"}}},
      {{"...", 0, kMaxGemmSize}, {"in_features", 1, kMaxGemmSize}, {"columns", 1, kMaxGemmSize / out_features.times}}};
}

GemmShape make_shape(Attributes const& attributes, Sizes const& sizes) {
  int64_t const out_features = sizes["columns"] * (is_swiglu(attributes.activation) ? 2 : 1);
  return gemm_shape(attributes, sizes.leading(), sizes["in_features"], out_features);
}

}  // namespace

AttributeSchema const& GemmPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      2,
      {
          {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
          {"bias", PluginFieldType::kINT32, offsetof(Attributes, bias), false},
          {"activation", PluginFieldType::kINT32, offsetof(Attributes, activation), false},
          {"constant_weight", PluginFieldType::kINT32, offsetof(Attributes, constant_weight), false},
          {"kernels", PluginFieldType::kINT32, offsetof(Attributes, kernels), false, true, 2},
      }};
  return schema;
}

GemmPlugin::GemmPlugin(Attributes const& attributes) : GemmPluginBase(checked(attributes), make_roles, make_shape) {}

size_t GemmPlugin::workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const {
  GemmShape const largest = largest_shape(largest_inputs);
  // Few rows need a workspace, too, where in_features is no multiple of 8; at run time it may be smaller than here, and
  // not aligned.
  GemmShape unaligned = largest;
  unaligned.in_features = 1;
  return needed_workspace(unaligned, largest);
}

}  // namespace qwen_plugins
