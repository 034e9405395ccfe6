// The modes of Gemm.
#pragma once

#include <algorithm>
#include <limits>

#include "mode.h"

// The workspace for this number of rows and for fewer.
inline int64_t workspace_of_kernels(int64_t rows, int64_t in_features, std::vector<int32_t> kernels) {
  kernels.insert(kernels.end(), {std::numeric_limits<int32_t>::max(), 0});
  int64_t most = 0;
  int64_t rows_before = 0;
  for (size_t i = 0; i < kernels.size() && rows_before < rows; i += 2) {
    most = std::max(most, recorded_gemm_workspace(std::min<int64_t>(rows, kernels[i]), in_features, kernels[i + 1]));
    rows_before = kernels[i];
  }
  return most;
}

// x [5, 3, 64], of which 5 is dynamic, weight [48, 64].
inline Mode gemm_mode(nvinfer1::DataType type, bool bias, bool swiglu, bool constant_weight,
                      std::vector<int32_t> const& kernels = {}) {
  Mode mode{"Gemm", {}, {tensor(type, {5, 3, 64}), tensor(type, {48, 64})}, {tensor(type, {5, 3, swiglu ? 24 : 48})},
            {5},    {}};
  mode.fields.add("type_id", int_of(type)).add("bias", bias ? 1 : 0).add("activation", swiglu ? 1 : 0);
  if (constant_weight) {
    mode.fields.add("constant_weight", 1);  // not so by default
  }
  if (!kernels.empty()) {
    mode.fields.add_array("kernels", kernels);
  }
  int32_t choice = 0;  // for 15 rows
  for (size_t i = kernels.size(); i > 0; i -= 2) {
    choice = kernels[i - 2] >= 15 ? kernels[i - 1] : choice;
  }
  mode.workspace_bytes = workspace_of_kernels(15, 1, kernels);
  if (bias) {
    mode.inputs.push_back(tensor(type, {48}));
  }
  mode.check_launch = [=](Addresses const& inputs, Addresses const& outputs) {
    qwen_plugins::GemmParams const& params = recorded.gemm.value();
    CHECK(params.shape.rows == 15 && params.shape.in_features == 64 && params.shape.out_features == 48);
    CHECK((params.shape.activation == qwen_plugins::Activation::kSwiglu) == swiglu);
    CHECK(static_cast<int32_t>(params.shape.dtype) == int_of(type));
    CHECK(params.x == inputs[0] && params.x_row_stride == 64 && params.weight == inputs[1]);
    CHECK(params.bias == (bias ? inputs[2] : nullptr));
    CHECK(params.y == outputs[0] && params.constant_weight == constant_weight);
    CHECK(static_cast<int32_t>(params.choice) == choice);
    CHECK(params.workspace == workspace_address() && params.workspace_bytes == workspace_of_kernels(15, 64, kernels));
  };
  return mode;
}

inline std::vector<Mode> gemm_modes() {
  std::vector<Mode> modes;
  for (nvinfer1::DataType const type : tested_types()) {
    for (int const bits : {0, 1, 2, 3, 4, 5, 6, 7}) {
      modes.push_back(gemm_mode(type, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0));
    }
  }
  // Numbers that no build gives to a kernel are kept as well. With 64 values there is no room for more.
  std::vector<int32_t> most;
  for (int32_t rows = 1; rows <= 32; ++rows) {
    most.insert(most.end(), {rows, 100 * rows});
  }
  for (std::vector<int32_t> const& kernels :
       {std::vector<int32_t>{15, 7}, {14, 7}, {1, 1, 14, 2, 16, 3, 64, 4}, {2147483647, 2147483647}, most}) {
    modes.push_back(gemm_mode(nvinfer1::DataType::kHALF, true, false, true, kernels));
  }
  modes.push_back(gemm_mode(nvinfer1::DataType::kHALF, true, true, true));
  modes.back().plugin = "QwenGemm";
  return modes;
}
