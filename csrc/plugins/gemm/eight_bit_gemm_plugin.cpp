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

Attributes checked(Attributes attributes) {
  require_type("type_id", attributes.type_id, floating_types());
  require_type("x_type_id", attributes.x_type_id, code_types(true));
  require_one_of("activation", attributes.activation,
                 {static_cast<int32_t>(Activation::kNone), static_cast<int32_t>(Activation::kSwiglu)});
  require_flag("has_per_token_scaling", attributes.has_per_token_scaling);
  require_flag("quantize_output", attributes.quantize_output);
  require_flag("bias", attributes.bias);
  require_flag("constant_weight", attributes.constant_weight);
  check_features("in_features", attributes.in_features, kCodesOfInt32);
  if (is_int8(attributes) && attributes.in_features > kMaxInt8Inputs) {
    throw std::invalid_argument("field 'in_features' is " + std::to_string(attributes.in_features) +
                                "; expected at most " + std::to_string(kMaxInt8Inputs) + " with int8");
  }
  int32_t const unit = attributes.quantize_output != 0 ? kCodesOfInt32 : 1;  // of the columns of y
  check_features("out_features", attributes.out_features, unit * (is_swiglu(attributes.activation) ? 2 : 1));
  require_one_of("group_size", attributes.group_size,
                 is_int8(attributes) ? std::vector<int32_t>{0} : std::vector<int32_t>{0, kBlock});
  check_kernels(attributes.kernels);
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

std::string description(GemmShape const& shape) {
  return std::to_string(shape.rows) + " rows of " + std::to_string(shape.in_features) + " times 8-bit [" +
         std::to_string(shape.out_features) + ", " + std::to_string(shape.in_features) + "]";
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
    : PluginBase(checked(attributes), make_roles), choices_(choices_of(attributes.kernels)) {}

GemmShape EightBitGemmPlugin::shape(int64_t rows) const {
  GemmShape shape;
  shape.rows = rows;
  shape.in_features = attributes().in_features;
  shape.out_features = attributes().out_features;
  shape.activation = static_cast<Activation>(attributes().activation);
  shape.dtype = static_cast<DataType>(attributes().type_id);
  shape.weight_format.kind = is_int8(attributes()) ? WeightKind::kInt8Rows : WeightKind::kFp8Rows;
  shape.weight_format.group_size = attributes().group_size;
  shape.weight_format.scale_dtype = DataType::kFloat32;
  shape.x_scale_per_row = attributes().has_per_token_scaling != 0;
  shape.quantized_y = attributes().quantize_output != 0;
  return shape;
}

size_t EightBitGemmPlugin::needed_workspace(GemmShape const& shape) const {
  int64_t bytes = 0;
  check_cuda(gemm_workspace_bytes(shape, choices_, &bytes), [&] { return "workspace of " + description(shape); });
  return static_cast<size_t>(bytes);
}

size_t EightBitGemmPlugin::workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const {
  return needed_workspace(shape(roles().largest_sizes(largest_inputs).leading()));
}

void EightBitGemmPlugin::enqueue(Execution const& execution) const {
  GemmParams params;
  params.shape = shape(roles().sizes(execution.input_descs).leading());
  if (params.shape.rows == 0) {
    return;
  }
  params.x = input(execution, "x");
  params.weight = input(execution, "weight");
  params.scales = input(execution, "scales");
  params.x_scales = static_cast<float const*>(input(execution, "x_scales"));
  params.y_scale = static_cast<float const*>(input(execution, "y_scale"));
  params.bias = input(execution, "bias");
  params.y = output(execution, "y");
  params.x_row_stride = params.shape.in_features;
  params.constant_weight = attributes().constant_weight != 0;
  params.choice = choice_for(choices_, params.shape.rows);
  params.workspace = execution.workspace;
  // TensorRT does not pass the size. It granted workspace_bytes() of the largest shapes, which is at least this.
  params.workspace_bytes = static_cast<int64_t>(needed_workspace(params.shape));
  check_cuda(launch_gemm(params, execution.stream), [&] { return "launch of " + description(params.shape); });
}

}  // namespace qwen_plugins
