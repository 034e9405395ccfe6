// The RmsNorm plug-in for every version of TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>

#include "plugins/plugin_base.h"

namespace qwen_plugins {

struct RmsNormAttributes {
  float eps = 1e-6F;
  int32_t type_id = -1;
  int32_t weight_type_id = -1;  // -1: type_id
  int32_t residual = 0;
  int32_t unit_offset = 0;
  int32_t round_before_weight = 0;
};

class RmsNormPlugin : public PluginBase<RmsNormAttributes> {
 public:
  static constexpr char const* kName = "RmsNorm";
  static constexpr char const* kVersion = "1";
  static AttributeSchema const& schema();

  explicit RmsNormPlugin(Attributes const& attributes);

  // Launches the kernels for tensors of these shapes; zero rows launch nothing.
  void enqueue(Execution const& execution) const;
};

}  // namespace qwen_plugins
