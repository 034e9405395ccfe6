#include "gemm_plugin.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = GemmAttributes;

Attributes checked(Attributes attributes) {
  require_type("type_id", attributes.type_id, floating_types());
  require_flag("bias", attributes.bias);
  require_one_of("activation", attributes.activation,
                 {static_cast<int32_t>(Activation::kNone), static_cast<int32_t>(Activation::kSwiglu)});
  require_flag("constant_weight", attributes.constant_weight);
  check_kernels(attributes.kernels);
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

std::string description(GemmShape const& shape) {
  return std::to_string(shape.rows) + " rows of " + std::to_string(shape.in_features) + " times [" +
         std::to_string(shape.out_features) + ", " + std::to_string(shape.in_features) + "]";
}

}  // namespace

void check_features(char const* name, int32_t value, int32_t unit) {
  require_positive(name, value);
  if (value > kMaxGemmSize || (unit > 1 && value % unit != 0)) {
    throw std::invalid_argument("field '" + std::string(name) + "' is " + std::to_string(value) + "; expected " +
                                (unit > 1 ? "a multiple of " + std::to_string(unit) : "a number") + " up to " +
                                std::to_string(kMaxGemmSize));
  }
}

void check_kernels(Int32Array const& kernels) {
  auto const fail = [](std::string const& found, std::string const& expected) {
    throw std::invalid_argument("field 'kernels' has " + found + "; expected " + expected);
  };
  if (kernels.size % 2 != 0) {
    fail(std::to_string(kernels.size) + " values", "pairs");
  }
  int32_t rows_before = 0;
  for (int32_t i = 0; i < kernels.size; i += 2) {
    int32_t const rows = kernels.values[i], choice = kernels.values[i + 1];
    if (rows <= rows_before) {
      fail(std::to_string(rows) + " rows after " + std::to_string(rows_before), "more rows");
    }
    if (choice < 0) {
      fail("the kernel " + std::to_string(choice), "0 or a kernel's number");
    }
    rows_before = rows;
  }
}

std::vector<GemmChoiceUpTo> choices_of(Int32Array const& kernels) {
  std::vector<GemmChoiceUpTo> choices;
  for (int32_t i = 0; i < kernels.size; i += 2) {
    choices.push_back({kernels.values[i], static_cast<GemmChoice>(kernels.values[i + 1])});
  }
  return choices;
}

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

GemmPlugin::GemmPlugin(Attributes const& attributes)
    : PluginBase(checked(attributes), make_roles), choices_(choices_of(attributes.kernels)) {}

GemmShape GemmPlugin::shape(Sizes const& sizes) const {
  GemmShape shape;
  shape.rows = sizes.leading();
  shape.in_features = sizes["in_features"];
  shape.out_features = sizes["columns"] * (is_swiglu(attributes().activation) ? 2 : 1);
  shape.activation = static_cast<Activation>(attributes().activation);
  shape.dtype = static_cast<DataType>(attributes().type_id);
  return shape;
}

size_t GemmPlugin::needed_workspace(GemmShape const& shape, GemmShape const& described) const {
  int64_t bytes = 0;
  check_cuda(gemm_workspace_bytes(shape, choices_, &bytes), [&] { return "workspace of " + description(described); });
  return static_cast<size_t>(bytes);
}

size_t GemmPlugin::workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const {
  GemmShape const largest = shape(roles().largest_sizes(largest_inputs));
  // Few rows need a workspace, too, where in_features is no multiple of 8; at run time it may be smaller than here, and
  // not aligned.
  GemmShape unaligned = largest;
  unaligned.in_features = 1;
  return needed_workspace(unaligned, largest);
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
  params.choice = choice_for(choices_, params.shape.rows);
  params.workspace = execution.workspace;
  // TensorRT does not pass the size. It granted workspace_bytes() of the largest shapes, which is at least this.
  params.workspace_bytes = static_cast<int64_t>(needed_workspace(params.shape, params.shape));
  check_cuda(launch_gemm(params, execution.stream), [&] { return "launch of " + description(params.shape); });
}

}  // namespace qwen_plugins
