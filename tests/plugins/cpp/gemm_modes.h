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

// A quantized weight, and its packed form's shapes: int4 of [96, 192] or int8 of [96, 256], padded to 128 rows.
struct QuantizedMode {
  int bits = 4;
  int group_size = 64;  // 0: one group
  bool zeros = true;
  bool bias = true;
  bool swiglu = true;
  int scale_type = 1;
};

// x [5, 3, in_features], of which 5 is dynamic.
inline Mode quantized_gemm_mode(nvinfer1::DataType type, QuantizedMode const& given) {
  using nvinfer1::DataType;
  Extent const in_features = given.bits == 4 ? 192 : 256;
  Extent const groups = given.group_size == 0 ? 1 : 256 / given.group_size;
  Mode mode{"Gemm:2",
            {},
            {tensor(type, {5, 3, in_features}), tensor(DataType::kINT32, {2, 8, given.bits == 4 ? 256 : 512}),
             tensor(DataType::kINT32, {groups, 64})},
            {tensor(type, {5, 3, given.swiglu ? 48 : 96})},
            {5},
            {}};
  mode.fields.add("type_id", int_of(type)).add("in_features", static_cast<int32_t>(in_features));
  mode.fields.add("out_features", 96).add("weight_bits", given.bits).add("group_size", given.group_size);
  mode.fields.add("zeros", given.zeros ? 1 : 0).add("bias", given.bias ? 1 : 0);
  mode.fields.add("activation", given.swiglu ? 1 : 0).add("constant_weight", 1).add_array("kernels", {15, 7});
  mode.fields.add("scale_type_id", given.scale_type);
  if (given.zeros) {
    mode.inputs.push_back(tensor(DataType::kINT32, {groups, 32}));
  }
  if (given.bias) {
    mode.inputs.push_back(tensor(type, {96}));
  }
  mode.workspace_bytes = workspace_of_kernels(15, in_features, {15, 7});
  mode.check_launch = [=](Addresses const& inputs, Addresses const& outputs) {
    qwen_plugins::GemmParams const& params = recorded.gemm.value();
    qwen_plugins::WeightFormat const& format = params.shape.weight_format;
    CHECK(params.shape.rows == 15 && params.shape.in_features == in_features && params.shape.out_features == 96);
    CHECK((params.shape.activation == qwen_plugins::Activation::kSwiglu) == given.swiglu);
    CHECK(static_cast<int32_t>(params.shape.dtype) == int_of(type));
    CHECK(qwen_plugins::is_quantized(format) && (format.kind == qwen_plugins::WeightKind::kInt4) == (given.bits == 4));
    CHECK(format.group_size == given.group_size && format.has_zeros == given.zeros);
    CHECK(static_cast<int32_t>(format.scale_dtype) == given.scale_type);
    CHECK(params.x == inputs[0] && params.x_row_stride == in_features && params.weight == inputs[1]);
    CHECK(params.scales == inputs[2] && params.zeros == (given.zeros ? inputs[3] : nullptr));
    CHECK(params.bias == (given.bias ? inputs.back() : nullptr));
    CHECK(params.y == outputs[0] && params.constant_weight && static_cast<int32_t>(params.choice) == 7);
    CHECK(params.workspace == workspace_address());
    CHECK(params.workspace_bytes == workspace_of_kernels(15, in_features, {15, 7}));
  };
  return mode;
}

inline std::vector<Mode> quantized_gemm_modes() {
  std::vector<Mode> modes;
  for (nvinfer1::DataType const type : tested_types()) {
    for (int const bits : {0, 1, 2, 3, 4, 5, 6, 7}) {
      QuantizedMode mode;
      mode.zeros = (bits & 1) != 0;
      mode.bias = (bits & 2) != 0;
      mode.swiglu = (bits & 4) != 0;
      modes.push_back(quantized_gemm_mode(type, mode));
    }
  }
  for (int const group_size : {0, 32, 128}) {
    QuantizedMode mode;
    mode.bits = 8;
    mode.group_size = group_size;
    mode.scale_type = 7;
    modes.push_back(quantized_gemm_mode(nvinfer1::DataType::kHALF, mode));
  }
  modes.push_back(quantized_gemm_mode(nvinfer1::DataType::kHALF, {}));
  modes.back().plugin = "QwenGemm:2";
  return modes;
}

// x and a weight [96, 192] of codes.
struct EightBitMode {
  nvinfer1::DataType code_type = nvinfer1::DataType::kFP8;
  bool blocks = false;
  bool per_token = false;
  bool quantizes = true;
  bool bias = true;
  bool swiglu = true;
};

// x [5, 3, 192 / 4], of which 5 is dynamic.
inline Mode eight_bit_gemm_mode(nvinfer1::DataType type, EightBitMode const& given) {
  using nvinfer1::DataType;
  Extent const columns = given.swiglu ? 48 : 96;
  Mode mode{"Gemm:3",
            {},
            {tensor(DataType::kINT32, {5, 3, 48}), tensor(DataType::kINT32, {96, 48}),
             given.blocks ? tensor(DataType::kFLOAT, {1, 2}) : tensor(DataType::kFLOAT, {96}),
             given.per_token ? tensor(DataType::kFLOAT, {5, 3, 1}) : tensor(DataType::kFLOAT, {1})},
            {given.quantizes ? tensor(DataType::kINT32, {5, 3, columns / 4}) : tensor(type, {5, 3, columns})},
            {5},
            {}};
  mode.fields.add("type_id", int_of(type)).add("x_type_id", int_of(given.code_type)).add("in_features", 192);
  mode.fields.add("out_features", 96).add("group_size", given.blocks ? 128 : 0);
  mode.fields.add("has_per_token_scaling", given.per_token ? 1 : 0).add("quantize_output", given.quantizes ? 1 : 0);
  mode.fields.add("bias", given.bias ? 1 : 0).add("activation", given.swiglu ? 1 : 0).add("constant_weight", 1);
  mode.fields.add_array("kernels", {15, 7});
  if (given.quantizes) {
    mode.inputs.push_back(tensor(DataType::kFLOAT, {1}));
  }
  if (given.bias) {
    mode.inputs.push_back(tensor(type, {96}));
  }
  mode.workspace_bytes = workspace_of_kernels(15, 192, {15, 7});
  mode.check_launch = [=](Addresses const& inputs, Addresses const& outputs) {
    qwen_plugins::GemmParams const& params = recorded.gemm.value();
    qwen_plugins::WeightFormat const& format = params.shape.weight_format;
    CHECK(params.shape.rows == 15 && params.shape.in_features == 192 && params.shape.out_features == 96);
    CHECK((params.shape.activation == qwen_plugins::Activation::kSwiglu) == given.swiglu);
    CHECK(static_cast<int32_t>(params.shape.dtype) == int_of(type));
    CHECK(static_cast<int32_t>(qwen_plugins::x_type_of(params.shape)) == int_of(given.code_type));
    CHECK(qwen_plugins::has_quantized_x(format) && format.group_size == (given.blocks ? 128 : 0));
    CHECK(format.scale_dtype == qwen_plugins::DataType::kFloat32 && !format.has_zeros);
    CHECK(params.shape.x_scale_per_row == given.per_token && params.shape.quantized_y == given.quantizes);
    CHECK(params.x == inputs[0] && params.x_row_stride == 192 && params.weight == inputs[1]);
    CHECK(params.scales == inputs[2] && params.x_scales == inputs[3]);
    CHECK(params.y_scale == (given.quantizes ? inputs[4] : nullptr));
    CHECK(params.bias == (given.bias ? inputs.back() : nullptr));
    CHECK(params.y == outputs[0] && params.constant_weight && static_cast<int32_t>(params.choice) == 7);
    CHECK(params.workspace == workspace_address());
    CHECK(params.workspace_bytes == workspace_of_kernels(15, 192, {15, 7}));
  };
  return mode;
}

inline std::vector<Mode> eight_bit_gemm_modes() {
  using nvinfer1::DataType;
  std::vector<Mode> modes;
  for (DataType const type : tested_types()) {
    for (int bits = 0; bits < 16; ++bits) {
      EightBitMode mode;
      mode.per_token = (bits & 1) != 0;
      mode.quantizes = (bits & 2) != 0;
      mode.bias = (bits & 4) != 0;
      mode.swiglu = (bits & 8) != 0;
      for (DataType const code_type : {DataType::kINT8, DataType::kFP8}) {
        mode.code_type = code_type;
        modes.push_back(eight_bit_gemm_mode(type, mode));
      }
      mode.blocks = true;
      modes.push_back(eight_bit_gemm_mode(type, mode));
    }
  }
  modes.push_back(eight_bit_gemm_mode(DataType::kHALF, {}));
  modes.back().plugin = "QwenGemm:3";
  return modes;
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
