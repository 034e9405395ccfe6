// The modes of RmsNorm, RmsNormQuantization, QuantizePerToken and QuantizeTensor.
#pragma once

#include "mode.h"

inline void check_common(qwen_plugins::RmsNormParams const& params, nvinfer1::DataType type,
                         nvinfer1::DataType weight_type, Addresses const& inputs) {
  CHECK(params.x == inputs[0] && params.weight == inputs[1]);
  CHECK(params.rows.total == 6 && params.rows.inner == 6 && params.hidden_size == 64);
  CHECK(params.x_strides.inner == 64 && params.residual_strides.inner == 64 && params.residual_out_strides.inner == 64);
  CHECK(params.eps == 1e-5F);
  CHECK(static_cast<int32_t>(params.dtype) == int_of(type));
  CHECK(static_cast<int32_t>(params.weight_dtype) == int_of(weight_type));
}

inline Mode rms_norm_mode(nvinfer1::DataType type, nvinfer1::DataType weight_type, bool residual) {
  Mode mode{"RmsNorm", {}, {tensor(type, {2, 3, 64}), tensor(weight_type, {64})}, {tensor(type, {2, 3, 64})}, {2}, {}};
  mode.fields.add("eps", 1e-5F).add("type_id", int_of(type)).add("weight_type_id", int_of(weight_type));
  mode.fields.add("residual", residual ? 1 : 0).add("unit_offset", 1).add("round_before_weight", residual ? 1 : 0);
  if (residual) {
    mode.inputs.push_back(tensor(type, {2, 3, 64}));
    mode.outputs.push_back(tensor(type, {2, 3, 64}));
  }
  mode.check_launch = [=](Addresses const& inputs, Addresses const& outputs) {
    qwen_plugins::RmsNormParams const& params = recorded.rms_norm.value();
    check_common(params, type, weight_type, inputs);
    CHECK(params.y == outputs[0] && params.y_strides.inner == 64 && params.unit_offset);
    CHECK(params.round_before_weight == residual);
    CHECK(params.residual == (residual ? inputs[2] : nullptr));
    CHECK(params.residual_out == (residual ? outputs[1] : nullptr));
  };
  return mode;
}

// Codes of 8 bits [2, 3, 64]; with `as_int32` to TensorRT int32 [2, 3, 16].
inline nvinfer1::PluginTensorDesc code_tensor(nvinfer1::DataType type, bool as_int32) {
  return as_int32 ? tensor(nvinfer1::DataType::kINT32, {2, 3, 16}) : tensor(type, {2, 3, 64});
}

// The types of codes that this TensorRT passes between layers, or int32 in their place.
inline std::vector<nvinfer1::DataType> code_types(bool as_int32) {
  using nvinfer1::DataType;
  bool const has_float8 = as_int32 || QWEN_PLUGINS_TENSORRT_MAJOR >= 10;
  return has_float8 ? std::vector<DataType>{DataType::kINT8, DataType::kFP8} : std::vector<DataType>{DataType::kINT8};
}

inline Mode quantization_mode(nvinfer1::DataType type, nvinfer1::DataType out_type, bool dynamic, bool residual,
                              bool smoothing, bool as_int32 = false) {
  using nvinfer1::DataType;
  std::vector<nvinfer1::PluginTensorDesc> inputs{tensor(type, {2, 3, 64}), tensor(type, {64})};
  std::vector<nvinfer1::PluginTensorDesc> outputs{code_tensor(out_type, as_int32)};
  if (residual) {
    inputs.push_back(tensor(type, {2, 3, 64}));
  }
  if (dynamic) {
    outputs.push_back(tensor(DataType::kFLOAT, {2, 3, 1}));
  } else {
    inputs.push_back(tensor(DataType::kFLOAT, {1}));
  }
  if (smoothing) {
    inputs.push_back(tensor(DataType::kFLOAT, {64}));
  }
  if (residual) {
    outputs.push_back(tensor(type, {2, 3, 64}));
  }
  Mode mode{"RmsNormQuantization", {}, inputs, outputs, {2}, {}};
  mode.fields.add("eps", 1e-5F).add("type_id", int_of(type)).add("dyn_act_scaling", dynamic ? 1 : 0);
  mode.fields.add("out_type_id", int_of(out_type)).add("residual", residual ? 1 : 0);
  mode.fields.add("smoothing", smoothing ? 1 : 0);
  if (as_int32) {
    mode.fields.add("int32_output", 1);  // not so by default
  }
  mode.check_launch = [=](Addresses const& in, Addresses const& out) {
    qwen_plugins::RmsNormQuantParams const& params = recorded.rms_norm_quant.value();
    check_common(params, type, type, in);
    CHECK(params.q == out[0] && !params.unit_offset);
    CHECK(static_cast<int32_t>(params.quant_dtype) == int_of(out_type));
    CHECK(params.residual == (residual ? in[2] : nullptr));
    CHECK(params.residual_out == (residual ? out.back() : nullptr));
    CHECK(params.scales == (dynamic ? out[1] : nullptr));
    CHECK(params.static_scale == (dynamic ? nullptr : in[residual ? 3 : 2]));
    CHECK(params.smoothing == (smoothing ? in.back() : nullptr));
    CHECK(params.smoothing_dtype == qwen_plugins::DataType::kFloat32);
  };
  return mode;
}

inline Mode quantize_mode(nvinfer1::DataType type, nvinfer1::DataType out_type, bool per_token, bool as_int32) {
  using nvinfer1::DataType;
  Mode mode{per_token ? "QuantizePerToken" : "QuantizeTensor",
            {},
            {tensor(type, {2, 3, 64})},
            {code_tensor(out_type, as_int32)},
            {2},
            {}};
  mode.fields.add("type_id", int_of(type)).add("out_type_id", int_of(out_type)).add("int32_output", as_int32 ? 1 : 0);
  if (per_token) {
    mode.outputs.push_back(tensor(DataType::kFLOAT, {2, 3, 1}));
  } else {
    mode.inputs.push_back(tensor(DataType::kFLOAT, {1}));
  }
  mode.check_launch = [=](Addresses const& in, Addresses const& out) {
    qwen_plugins::QuantizeParams const& params = recorded.quantize.value();
    CHECK(params.x == in[0] && params.q == out[0]);
    CHECK(params.rows == 6 && params.columns == 64 && params.x_row_stride == 64);
    CHECK(static_cast<int32_t>(params.dtype) == int_of(type));
    CHECK(static_cast<int32_t>(params.quant_dtype) == int_of(out_type));
    CHECK(params.scales == (per_token ? out[1] : nullptr));
    CHECK(params.static_scale == (per_token ? nullptr : in[1]));
  };
  return mode;
}

inline std::vector<Mode> quantize_modes() {
  std::vector<Mode> modes;
  for (nvinfer1::DataType const type : tested_types()) {
    for (bool const as_int32 : {false, true}) {
      for (nvinfer1::DataType const out_type : code_types(as_int32)) {
        modes.push_back(quantize_mode(type, out_type, true, as_int32));
        modes.push_back(quantize_mode(type, out_type, false, as_int32));
      }
    }
  }
  return modes;
}

inline std::vector<Mode> rms_norm_modes() {
  using nvinfer1::DataType;
  std::vector<Mode> modes;
  for (DataType const type : tested_types()) {
    for (bool const residual : {false, true}) {
      modes.push_back(rms_norm_mode(type, type, residual));
      modes.push_back(rms_norm_mode(type, DataType::kFLOAT, residual));
      for (int const bits : {0, 1, 2, 3}) {
        for (DataType const out_type : code_types(false)) {
          modes.push_back(quantization_mode(type, out_type, (bits & 1) != 0, residual, (bits & 2) != 0));
        }
        for (DataType const out_type : code_types(true)) {
          modes.push_back(quantization_mode(type, out_type, (bits & 1) != 0, residual, (bits & 2) != 0, true));
        }
      }
    }
  }
  return modes;
}
