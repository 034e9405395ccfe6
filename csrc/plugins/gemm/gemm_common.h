// What all versions of the Gemm plug-in share: checks of attributes, the kernels that a network's author chose, the
// workspace and the launch.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/gemm/choice.h"
#include "kernels/gemm/gemm.h"
#include "plugins/plugin_base.h"

namespace qwen_plugins {

// Whether an attribute `activation` is SwiGLU.
inline bool is_swiglu(int32_t activation) { return activation == static_cast<int32_t>(Activation::kSwiglu); }

// These checks throw std::invalid_argument. A number of features is one that a launch takes, and a multiple of `unit`.
void check_features(char const* name, int32_t value, int32_t unit);
void check_kernels(Int32Array const& kernels);

// What an attribute `kernels` means.
std::vector<GemmChoiceUpTo> choices_of(Int32Array const& kernels);

// Checks the attributes that every version has; throws std::invalid_argument for values that are out of range.
template <typename Attributes>
void check_gemm_attributes(Attributes const& attributes) {
  require_type("type_id", attributes.type_id, floating_types());
  require_flag("bias", attributes.bias);
  require_one_of("activation", attributes.activation,
                 {static_cast<int32_t>(Activation::kNone), static_cast<int32_t>(Activation::kSwiglu)});
  require_flag("constant_weight", attributes.constant_weight);
  check_kernels(attributes.kernels);
}

// The shape of a GEMM of weights that are not quantized, with the type and activation of the attributes.
template <typename Attributes>
GemmShape gemm_shape(Attributes const& attributes, int64_t rows, int64_t in_features, int64_t out_features) {
  GemmShape shape;
  shape.rows = rows;
  shape.in_features = in_features;
  shape.out_features = out_features;
  shape.activation = static_cast<Activation>(attributes.activation);
  shape.dtype = static_cast<DataType>(attributes.type_id);
  return shape;
}

// The workspace for `shape`, which may be another than `described`, the one that a message is to name.
size_t workspace_of(GemmShape const& shape, std::vector<GemmChoiceUpTo> const& choices, GemmShape const& described);

// Launches the kernels for the tensors that these roles have; zero rows launch nothing.
void enqueue_gemm(Execution const& execution, TensorRoles const& roles, GemmShape const& shape, bool constant_weight,
                  std::vector<GemmChoiceUpTo> const& choices);

// A version of the plug-in adds its name, version, schema and constructor to this.
template <typename AttributesType>
class GemmPluginBase : public PluginBase<AttributesType> {
 public:
  size_t workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const {
    GemmShape const largest = largest_shape(largest_inputs);
    return needed_workspace(largest, largest);
  }

  // Launches the kernels for tensors of these shapes; zero rows launch nothing.
  void enqueue(Execution const& execution) const {
    GemmShape const shape = make_shape_(this->attributes(), this->roles().sizes(execution.input_descs));
    enqueue_gemm(execution, this->roles(), shape, this->attributes().constant_weight != 0, choices_);
  }

 protected:
  using MakeShape = GemmShape (*)(AttributesType const& attributes, Sizes const& sizes);

  GemmPluginBase(AttributesType const& checked, TensorRoles (*make_roles)(AttributesType const&), MakeShape make_shape)
      : PluginBase<AttributesType>(checked, make_roles),
        make_shape_(make_shape),
        choices_(choices_of(checked.kernels)) {}

  GemmShape largest_shape(nvinfer1::PluginTensorDesc const* largest_inputs) const {
    return make_shape_(this->attributes(), this->roles().largest_sizes(largest_inputs));
  }

  size_t needed_workspace(GemmShape const& shape, GemmShape const& described) const {
    return workspace_of(shape, choices_, described);
  }

 private:
  MakeShape make_shape_;
  std::vector<GemmChoiceUpTo> choices_;
};

// The same plug-in under a name that no operator of ONNX has, for networks from ONNX files: some parsers take a node
// called Gemm for ONNX's operator, whatever its domain.
template <typename Plugin>
class QwenGemm : public Plugin {
 public:
  static constexpr char const* kName = "QwenGemm";
  using Plugin::Plugin;
};

}  // namespace qwen_plugins
