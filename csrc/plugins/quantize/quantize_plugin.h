// The QuantizePerToken and QuantizeTensor plug-ins for every version of TensorRT. README.md has their inputs, outputs
// and attributes.
#pragma once

#include <cstdint>

#include "plugins/plugin_base.h"

namespace qwen_plugins {

struct QuantizeAttributes {
  int32_t type_id = -1;
  int32_t out_type_id = static_cast<int32_t>(nvinfer1::DataType::kINT8);
  int32_t int32_output = 0;  // q is int32 to TensorRT, four codes in each number
};

class QuantizePlugin : public PluginBase<QuantizeAttributes> {
 public:
  static constexpr char const* kVersion = "1";

  // Launches the kernel for tensors of these shapes; zero rows launch nothing.
  void enqueue(Execution const& execution) const;

 protected:
  QuantizePlugin(Attributes const& attributes, TensorRoles (*make_roles)(Attributes const&));
};

class QuantizePerTokenPlugin : public QuantizePlugin {
 public:
  static constexpr char const* kName = "QuantizePerToken";
  static AttributeSchema const& schema();

  explicit QuantizePerTokenPlugin(Attributes const& attributes);
};

class QuantizeTensorPlugin : public QuantizePlugin {
 public:
  static constexpr char const* kName = "QuantizeTensor";
  static AttributeSchema const& schema();

  explicit QuantizeTensorPlugin(Attributes const& attributes);
};

}  // namespace qwen_plugins
