#include "quantized_gemm_plugin.h"

#include "kernels/gemm/packed_weight.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = QuantizedGemmAttributes;

WeightFormat format_of(Attributes const& attributes) {
  WeightFormat format;
  format.kind = attributes.weight_bits == 4 ? WeightKind::kInt4 : WeightKind::kInt8;
  format.group_size = attributes.group_size;
  format.has_zeros = attributes.zeros != 0;
  format.scale_dtype = static_cast<DataType>(attributes.scale_type_id);
  return format;
}

Attributes checked(Attributes const& attributes) {
  check_gemm_attributes(attributes);
  require_one_of("weight_bits", attributes.weight_bits, {4, 8});
  require_one_of("group_size", attributes.group_size, {0, 32, 64, 128});
  require_flag("zeros", attributes.zeros);
  require_one_of("scale_type_id", attributes.scale_type_id,
                 {static_cast<int32_t>(DataType::kFloat16), static_cast<int32_t>(DataType::kBFloat16)});
  check_features("in_features", attributes.in_features, attributes.group_size);
  check_features("out_features", attributes.out_features, is_swiglu(attributes.activation) ? 2 : 1);
  return attributes;
}

// The packed weight is int32 to TensorRT, which leaves that alone: codes, two scales in a word, four zero points.
TensorRoles make_roles(Attributes const& attributes) {
  using nvinfer1::DataType;
  auto const type = static_cast<DataType>(attributes.type_id);
  WeightFormat const format = format_of(attributes);
  PackedSizes const sizes(format, attributes.out_features, attributes.in_features);
  Pattern const codes{sizes.k / kPackedK, sizes.rows / kPackedRows, int64_t{superblock_bytes_of(format.kind)} / 4};
  std::vector<TensorRole> inputs{{"x", type, {"...", int64_t{attributes.in_features}}},
                                 {"weight", DataType::kINT32, codes},
                                 {"scales", DataType::kINT32, {sizes.groups, sizes.rows / 2}}};
  if (attributes.zeros != 0) {
    inputs.push_back({"zeros", DataType::kINT32, {sizes.groups, sizes.rows / 4}});
  }
  if (attributes.bias != 0) {
    inputs.push_back({"bias", type, {int64_t{attributes.out_features}}});
  }
  int64_t const columns = attributes.out_features / (is_swiglu(attributes.activation) ? 2 : 1);
  return {inputs, {{"y", type, {"...", columns}}}, {{"...", 0, kMaxGemmSize}}};
}

GemmShape make_shape(Attributes const& attributes, Sizes const& sizes) {
  GemmShape shape = gemm_shape(attributes, sizes.leading(), attributes.in_features, attributes.out_features);
  shape.weight_format = format_of(attributes);
  return shape;
}

}  // namespace

AttributeSchema const& QuantizedGemmPlugin::schema() {
  static AttributeSchema const schema{
      kName,
      1,
      {
          {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
          {"in_features", PluginFieldType::kINT32, offsetof(Attributes, in_features), true},
          {"out_features", PluginFieldType::kINT32, offsetof(Attributes, out_features), true},
          {"weight_bits", PluginFieldType::kINT32, offsetof(Attributes, weight_bits), true},
          {"group_size", PluginFieldType::kINT32, offsetof(Attributes, group_size), false},
          {"zeros", PluginFieldType::kINT32, offsetof(Attributes, zeros), false},
          {"scale_type_id", PluginFieldType::kINT32, offsetof(Attributes, scale_type_id), false},
          {"bias", PluginFieldType::kINT32, offsetof(Attributes, bias), false},
          {"activation", PluginFieldType::kINT32, offsetof(Attributes, activation), false},
          {"constant_weight", PluginFieldType::kINT32, offsetof(Attributes, constant_weight), false},
          {"kernels", PluginFieldType::kINT32, offsetof(Attributes, kernels), false, true},
      }};
  return schema;
}

QuantizedGemmPlugin::QuantizedGemmPlugin(Attributes const& attributes)
    : GemmPluginBase(checked(attributes), make_roles, make_shape) {}

}  // namespace qwen_plugins
