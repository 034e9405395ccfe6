#include "gemm_common.h"

#include <string>

namespace qwen_plugins {
namespace {

// A GEMM in messages.
std::string description(GemmShape const& shape) {
  WeightFormat const& format = shape.weight_format;
  std::string const weight = is_packed(format) ? "quantized " : has_quantized_x(format) ? "8-bit " : "";
  return std::to_string(shape.rows) + " rows of " + std::to_string(shape.in_features) + " times " + weight + "[" +
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

size_t workspace_of(GemmShape const& shape, std::vector<GemmChoiceUpTo> const& choices, GemmShape const& described) {
  int64_t bytes = 0;
  check_cuda(gemm_workspace_bytes(shape, choices, &bytes), [&] { return "workspace of " + description(described); });
  return static_cast<size_t>(bytes);
}

void enqueue_gemm(Execution const& execution, TensorRoles const& roles, GemmShape const& shape, bool constant_weight,
                  std::vector<GemmChoiceUpTo> const& choices) {
  if (shape.rows == 0) {
    return;
  }
  auto const input = [&](char const* name) { return input_of(execution, roles, name); };
  GemmParams params;
  params.shape = shape;
  params.x = input("x");
  params.weight = input("weight");
  params.scales = input("scales");
  params.zeros = input("zeros");
  params.x_scales = static_cast<float const*>(input("x_scales"));
  params.y_scale = static_cast<float const*>(input("y_scale"));
  params.bias = input("bias");
  params.y = output_of(execution, roles, "y");
  params.x_row_stride = shape.in_features;
  params.constant_weight = constant_weight;
  params.choice = choice_for(choices, shape.rows);
  params.workspace = execution.workspace;
  // TensorRT does not pass the size. It granted workspace_bytes() of the largest shapes, which is at least this.
  params.workspace_bytes = static_cast<int64_t>(workspace_of(shape, choices, shape));
  check_cuda(launch_gemm(params, execution.stream), [&] { return "launch of " + description(shape); });
}

}  // namespace qwen_plugins
