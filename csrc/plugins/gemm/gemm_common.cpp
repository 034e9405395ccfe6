#include "gemm_common.h"

namespace qwen_plugins {

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

std::string description(GemmShape const& shape) {
  WeightFormat const& format = shape.weight_format;
  std::string const weight = is_packed(format) ? "quantized " : has_quantized_x(format) ? "8-bit " : "";
  return std::to_string(shape.rows) + " rows of " + std::to_string(shape.in_features) + " times " + weight + "[" +
         std::to_string(shape.out_features) + ", " + std::to_string(shape.in_features) + "]";
}

}  // namespace qwen_plugins
