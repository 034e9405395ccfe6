#include "eight_bit_gemm_plugin.h"

#include "kernels/common/arithmetic.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = EightBitGemmAttributes;

constexpr int32_t kBlock = 128;  // rows and columns of a weight that share a scale

bool is_int8(Attributes const& attributes) {
  return attributes.x_type_id == static_cast<int32_t>(nvinfer1::DataType::kINT8);
}

int32_t columns_of(Attributes const& attributes) {
  return attributes.out_features / (is_swiglu(attributes.activation) ? 2 : 1);
}

Attributes checked(Attributes const& attributes) {
  check_gemm_attributes(attributes);
  require_type("x_type_id", attributes.x_type_id, code_types(true));
  require_flag("has_per_token_scaling", attributes.has_per_token_scaling);
  require_flag("quantize_output", attributes.quantize_output);
  check_features("in_features", attributes.in_features, kCodesOfInt32);
  if (is_int8(attributes) && attributes.in_features > kMaxInt8Inputs) {
    throw std::invalid_argument("field 'in_features' is " + std::to_string(attributes.in_features) +
                                "; expected at most " + std::to_string(kMaxInt8Inputs) + " with int8");
  }
  int32_t const unit = attributes.quantize_output != 0 ? kCodesOfInt32 : 1;  // of the columns of y
  check_features("out_features", attributes.out_features, unit * (is_swiglu(attributes.activation) ? 2 : 1));
  require_one_of("group_size", attributes.group_size,
                 is_int8(attributes) ? std::vector<int32_t>{0} : std::vector<int32_t>{0, kBlock});
  return attributes;
}

// Codes are int32 to TensorRT, which leaves that alone.
TensorRoles make_roles(Attributes const& attributes) {
  using nvinfer1::DataType;
  auto const type = static_cast<DataType>(attributes.type_id);
  int64_t const out_features = attributes.out_features;
  int64_t const in_words = attributes.in_features / kCodesOfInt32;
  Pattern const scales = attributes.group_size == 0 ? Pattern{out_features}
                                                    : Pattern{divide_up(out_features, kBlock),
                                                              divide_up(int64_t{attributes.in_features}, kBlock)};
  std::vector<TensorRole> inputs{{"x", DataType::kINT32, {"...", in_words}},
                                 {"weight", DataType::kINT32, {out_features, in_words}},
                                 {"scales", DataType::kFLOAT, scales}};
  if (attributes.has_per_token_scaling != 0) {
    inputs.push_back({"x_scales", DataType::kFLOAT, {"...", 1}});
  } else {
    inputs.push_back({"x_scales", DataType::kFLOAT, {1}, true});
  }
  if (attributes.quantize_output != 0) {
    inputs.push_back({"y_scale", DataType::kFLOAT, {1}, true});
  }
  if (attributes.bias != 0) {
    inputs.push_back({"bias", type, {out_features}});
  }
  int64_t const columns = columns_of(attributes);
  TensorRole y{"y", type, {"...", columns}};
  if (attributes.quantize_output != 0) {
    y = {"y", DataType::kINT32, {"...", columns / kCodesOfInt32}};
  }
  return {inputs, {y}, {{"...", 0, kMaxGemmSize}}};
}

GemmShape make_shape(Attributes const& attributes, Sizes const& sizes) {
  GemmShape shape = gemm_shape(attributes, sizes.leading(), attributes.in_features, attributes.out_features);
  shape.weight_format.kind = is_int8(attributes) ? WeightKind::kInt8Rows : WeightKind::kFp8Rows;
  shape.weight_format.group_size = attributes.group_size;
  shape.weight_format.scale_dtype = DataType::kFloat32;
  shape.x_scale_per_row = attributes.has_per_token_scaling != 0;
  shape.quantized_y = attributes.quantize_output != 0;
  return shape;
}

}  // namespace

AttributeSchema const& EightBitGemmPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      1,
      {
          {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
          {"x_type_id", PluginFieldType::kINT32, offsetof(Attributes, x_type_id), true},
          {"in_features", PluginFieldType::kINT32, offsetof(Attributes, in_features), true},
          {"out_features", PluginFieldType::kINT32, offsetof(Attributes, out_features), true},
          {"group_size", PluginFieldType::kINT32, offsetof(Attributes, group_size), false},
          {"has_per_token_scaling", PluginFieldType::kINT32, offsetof(Attributes, has_per_token_scaling), false},
          {"quantize_output", PluginFieldType::kINT32, offsetof(Attributes, quantize_output), false},
          {"bias", PluginFieldType::kINT32, offsetof(Attributes, bias), false},
          {"activation", PluginFieldType::kINT32, offsetof(Attributes, activation), false},
          {"constant_weight", PluginFieldType::kINT32, offsetof(Attributes, constant_weight), false},
          {"kernels", PluginFieldType::kINT32, offsetof(Attributes, kernels), false, true},
      }};
  return schema;
}

EightBitGemmPlugin::EightBitGemmPlugin(Attributes const& attributes)
    : GemmPluginBase(checked(attributes), make_roles, make_shape) {}

}  // namespace qwen_plugins
