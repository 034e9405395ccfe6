// A mode is one way to use a plug-in: its fields, its tensors, and what enqueue must pass to the kernels.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "recorded_launches.h"
#include "tensorrt_double.h"

using Addresses = std::vector<void*>;

struct Mode {
  char const* plugin;  // its name, and ":2" where the version is not "1"
  Fields fields;
  std::vector<nvinfer1::PluginTensorDesc> inputs;
  std::vector<nvinfer1::PluginTensorDesc> outputs;
  // Extents that TensorRT does not know when it asks for shapes.
  std::vector<Extent> dynamic;
  // Checks what was recorded of an enqueue with these addresses of inputs and outputs.
  std::function<void(Addresses const& inputs, Addresses const& outputs)> check_launch;
  size_t workspace_bytes = 0;
  bool runs_on_anything = true;  // enqueue makes a launch whatever the inputs hold
  bool in_place = false;         // output 1 must have the memory of input 1
};

inline std::string name_of(std::string const& plugin) { return plugin.substr(0, plugin.find(':')); }

inline std::string version_of(std::string const& plugin) {
  size_t const colon = plugin.find(':');
  return colon == std::string::npos ? "1" : plugin.substr(colon + 1);
}

inline bool is_dynamic(Mode const& mode, Extent extent) {
  return std::find(mode.dynamic.begin(), mode.dynamic.end(), extent) != mode.dynamic.end();
}

inline int32_t int_of(nvinfer1::DataType type) { return static_cast<int32_t>(type); }

inline std::vector<nvinfer1::DataType> tested_types() {
  using nvinfer1::DataType;
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  return {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
#else
  return {DataType::kFLOAT, DataType::kHALF};
#endif
}

inline void* stream_address() { return address(0x5EAD); }
inline void* workspace_address() { return address(0x3A00); }

// Distinct addresses for the tensors, so that a mix-up shows.
inline Addresses addresses(size_t count, uintptr_t base) {
  Addresses result;
  for (size_t i = 0; i < count; ++i) {
    result.push_back(address(base + 4096 * i));
  }
  return result;
}

inline Addresses output_addresses(Mode const& mode, Addresses const& inputs) {
  Addresses result = addresses(mode.outputs.size(), 0x900000);
  if (mode.in_place) {
    result[1] = inputs[1];
  }
  return result;
}

// Calls `enqueue(inputs, outputs)` and checks the launch that it makes.
template <typename Enqueue>
void check_launch(Mode const& mode, Enqueue const& enqueue) {
  recorded = {};
  Addresses const inputs = addresses(mode.inputs.size(), 0x10000);
  Addresses const outputs = output_addresses(mode, inputs);
  CHECK(enqueue(inputs.data(), outputs.data()) == 0);
  CHECK(recorded.count == 1 && recorded.stream == stream_address());
  mode.check_launch(inputs, outputs);
}

// While TensorRT builds an engine it runs the plug-in made from fields on uninitialised memory.
template <typename Enqueue>
void check_launch_while_building(Mode const& mode, Enqueue const& enqueue) {
  recorded = {};
  Addresses const inputs = addresses(mode.inputs.size(), 0x10000);
  Addresses const outputs = addresses(mode.outputs.size(), 0x900000);
  CHECK(enqueue(inputs.data(), outputs.data()) == 0);
  CHECK(recorded.count == (mode.runs_on_anything ? 1 : 0) && !recorded.copy.has_value());
}

// The inputs' shapes before the engine runs.
inline std::vector<nvinfer1::DimsExprs> shapes_while_building(Mode const& mode, ShapeExpressions& builder) {
  std::vector<nvinfer1::DimsExprs> shapes;
  for (nvinfer1::PluginTensorDesc const& desc : mode.inputs) {
    nvinfer1::DimsExprs shape{};
    for (; shape.nbDims < desc.dims.nbDims; ++shape.nbDims) {
      Extent const extent = desc.dims.d[shape.nbDims];
      shape.d[shape.nbDims] = builder.make(is_dynamic(mode, extent) ? -1 : extent);
    }
    shapes.push_back(shape);
  }
  return shapes;
}

// Known dimensions are the expected numbers, the others expressions that an input has.
inline void check_shape(nvinfer1::DimsExprs const& shape, nvinfer1::Dims const& expected, Mode const& mode,
                        std::vector<nvinfer1::DimsExprs> const& inputs) {
  CHECK(shape.nbDims == expected.nbDims);
  for (int32_t i = 0; i < shape.nbDims; ++i) {
    if (!is_dynamic(mode, expected.d[i])) {
      CHECK(shape.d[i]->isConstant() && shape.d[i]->getConstantValue() == expected.d[i]);
      continue;
    }
    bool found = false;
    for (size_t input = 0; input < inputs.size(); ++input) {
      for (int32_t axis = 0; axis < inputs[input].nbDims; ++axis) {
        found |= inputs[input].d[axis] == shape.d[i] && mode.inputs[input].dims.d[axis] == expected.d[i];
      }
    }
    CHECK(found);
  }
}
