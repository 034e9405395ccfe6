// The modes of RmsNorm and RmsNormQuantization.
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

inline Mode quantization_mode(nvinfer1::DataType type, nvinfer1::DataType out_type, bool dynamic, bool residual,
                              bool smoothing) {
  using nvinfer1::DataType;
  std::vector<nvinfer1::PluginTensorDesc> inputs{tensor(type, {2, 3, 64}), tensor(type, {64})};
  std::vector<nvinfer1::PluginTensorDesc> outputs{tensor(out_type, {2, 3, 64})};
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

inline std::vector<Mode> rms_norm_modes() {
  using nvinfer1::DataType;
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  std::vector<DataType> const out_types{DataType::kINT8, DataType::kFP8};
#else
  std::vector<DataType> const out_types{DataType::kINT8};
#endif
  std::vector<Mode> modes;
  for (DataType const type : tested_types()) {
    for (bool const residual : {false, true}) {
      modes.push_back(rms_norm_mode(type, type, residual));
      modes.push_back(rms_norm_mode(type, DataType::kFLOAT, residual));
      for (DataType const out_type : out_types) {
        for (int const bits : {0, 1, 2, 3}) {
          modes.push_back(quantization_mode(type, out_type, (bits & 1) != 0, residual, (bits & 2) != 0));
        }
      }
    }
  }
  return modes;
}
