// The modes of Gemm.
#pragma once

#include "mode.h"

// x [5, 3, 64], of which 5 is dynamic, weight [48, 64].
inline Mode gemm_mode(nvinfer1::DataType type, bool bias, bool swiglu, bool constant_weight) {
  Mode mode{"Gemm", {}, {tensor(type, {5, 3, 64}), tensor(type, {48, 64})}, {tensor(type, {5, 3, swiglu ? 24 : 48})},
            {5},    {}};
  mode.fields.add("type_id", int_of(type)).add("bias", bias ? 1 : 0).add("activation", swiglu ? 1 : 0);
  if (constant_weight) {
    mode.fields.add("constant_weight", 1);  // not so by default
  }
  mode.workspace_bytes = recorded_gemm_workspace(15, 1);
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
    CHECK(params.workspace == workspace_address() && params.workspace_bytes == recorded_gemm_workspace(15, 64));
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
  return modes;
}
