// The plug-ins' tensors in every mode, and what enqueue must hand to the kernels; the same for every TensorRT.
#pragma once

#include <vector>

#include "recorded_launches.h"
#include "tensorrt_double.h"

// Types of the inputs, then of the outputs.
struct Mode {
  bool quantization;
  Fields fields;
  std::vector<nvinfer1::PluginTensorDesc> inputs;
  std::vector<nvinfer1::PluginTensorDesc> outputs;
};

inline Mode rms_norm_mode(nvinfer1::DataType type, nvinfer1::DataType weight_type, bool residual) {
  Mode mode{false, {}, {tensor(type, {2, 3, 64}), tensor(weight_type, {64})}, {tensor(type, {2, 3, 64})}};
  mode.fields.add("eps", 1e-5F).add("type_id", static_cast<int32_t>(type));
  mode.fields.add("weight_type_id", static_cast<int32_t>(weight_type)).add("residual", residual ? 1 : 0);
  mode.fields.add("unit_offset", 1).add("round_before_weight", residual ? 1 : 0);
  if (residual) {
    mode.inputs.push_back(tensor(type, {2, 3, 64}));
    mode.outputs.push_back(tensor(type, {2, 3, 64}));
  }
  return mode;
}

inline Mode quantization_mode(nvinfer1::DataType type, nvinfer1::DataType out_type, bool dynamic, bool residual,
                              bool smoothing) {
  using nvinfer1::DataType;
  Mode mode{true, {}, {tensor(type, {2, 3, 64}), tensor(type, {64})}, {tensor(out_type, {2, 3, 64})}};
  mode.fields.add("eps", 1e-5F).add("type_id", static_cast<int32_t>(type));
  mode.fields.add("dyn_act_scaling", dynamic ? 1 : 0).add("out_type_id", static_cast<int32_t>(out_type));
  mode.fields.add("residual", residual ? 1 : 0).add("smoothing", smoothing ? 1 : 0);
  if (residual) {
    mode.inputs.push_back(tensor(type, {2, 3, 64}));
  }
  if (dynamic) {
    mode.outputs.push_back(tensor(DataType::kFLOAT, {2, 3, 1}));
  } else {
    mode.inputs.push_back(tensor(DataType::kFLOAT, {1}));
  }
  if (smoothing) {
    mode.inputs.push_back(tensor(DataType::kFLOAT, {64}));
  }
  if (residual) {
    mode.outputs.push_back(tensor(type, {2, 3, 64}));
  }
  return mode;
}

inline std::vector<Mode> all_modes() {
  using nvinfer1::DataType;
  std::vector<DataType> types{DataType::kFLOAT, DataType::kHALF};
  std::vector<DataType> out_types{DataType::kINT8};
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  types.push_back(DataType::kBF16);
  out_types.push_back(DataType::kFP8);
#endif
  std::vector<Mode> modes;
  for (DataType const type : types) {
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

// Distinct addresses for the tensors, so that a mix-up shows.
inline std::vector<void*> addresses(size_t count, uintptr_t base) {
  std::vector<void*> result;
  for (size_t i = 0; i < count; ++i) {
    result.push_back(address(base + 4096 * i));
  }
  return result;
}

inline void check_common(qwen_plugins::RmsNormParams const& params, Mode const& mode,
                         std::vector<void*> const& inputs) {
  CHECK(params.x == inputs[0] && params.weight == inputs[1]);
  CHECK(params.rows.total == 6 && params.rows.inner == 6 && params.hidden_size == 64);
  CHECK(params.x_strides.inner == 64 && params.residual_strides.inner == 64 && params.residual_out_strides.inner == 64);
  CHECK(params.eps == 1e-5F);
  CHECK(static_cast<int>(params.dtype) == static_cast<int>(mode.inputs[0].type));
  CHECK(static_cast<int>(params.weight_dtype) == static_cast<int>(mode.inputs[1].type));
}

inline void check_rms_norm_launch(Mode const& mode, std::vector<void*> const& inputs,
                                  std::vector<void*> const& outputs) {
  qwen_plugins::RmsNormParams const& params = recorded.rms_norm.value();
  bool const residual = mode.inputs.size() == 3;
  check_common(params, mode, inputs);
  CHECK(params.y == outputs[0] && params.y_strides.inner == 64 && params.unit_offset);
  CHECK(params.round_before_weight == residual);
  CHECK(params.residual == (residual ? inputs[2] : nullptr));
  CHECK(params.residual_out == (residual ? outputs[1] : nullptr));
}

inline void check_quantization_launch(Mode const& mode, std::vector<void*> const& inputs,
                                      std::vector<void*> const& outputs, bool dynamic, bool residual, bool smoothing) {
  qwen_plugins::RmsNormQuantParams const& params = recorded.rms_norm_quant.value();
  check_common(params, mode, inputs);
  CHECK(params.q == outputs[0] && !params.unit_offset);
  CHECK(static_cast<int>(params.quant_dtype) == static_cast<int>(mode.outputs[0].type));
  CHECK(params.residual == (residual ? inputs[2] : nullptr));
  CHECK(params.residual_out == (residual ? outputs.back() : nullptr));
  CHECK(params.scales == (dynamic ? outputs[1] : nullptr));
  CHECK(params.static_scale == (dynamic ? nullptr : inputs[residual ? 3 : 2]));
  CHECK(params.smoothing == (smoothing ? inputs.back() : nullptr));
  CHECK(params.smoothing_dtype == qwen_plugins::DataType::kFloat32);
}

// Calls `enqueue(inputs, outputs)` and checks the launch that it makes.
template <typename Enqueue>
void check_launch(Mode const& mode, Enqueue const& enqueue) {
  recorded = {};
  std::vector<void*> const inputs = addresses(mode.inputs.size(), 0x10000);
  std::vector<void*> const outputs = addresses(mode.outputs.size(), 0x900000);
  CHECK(enqueue(inputs.data(), outputs.data()) == 0);
  CHECK(recorded.count == 1 && recorded.stream == address(0x5EAD));
  if (!mode.quantization) {
    check_rms_norm_launch(mode, inputs, outputs);
    return;
  }
  bool const dynamic = mode.outputs.size() > 1 && mode.outputs[1].dims.d[2] == 1;
  bool const residual = mode.outputs.size() == (dynamic ? 3 : 2);
  bool const smoothing = mode.inputs.size() == 3U + (residual ? 1U : 0U) + (dynamic ? 0U : 1U);
  check_quantization_launch(mode, inputs, outputs, dynamic, residual, smoothing);
}
