// The Gemm plug-in for every version of TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/gemm/choice.h"
#include "kernels/gemm/gemm.h"
#include "plugins/plugin_base.h"

namespace qwen_plugins {

struct GemmAttributes {
  int32_t type_id = -1;
  int32_t bias = 0;
  int32_t activation = static_cast<int32_t>(Activation::kNone);
  int32_t constant_weight = 0;  // right for any network
  Int32Array kernels;           // pairs of a number of rows and the GemmChoice for up to so many
};

// Whether an attribute `activation` is SwiGLU.
inline bool is_swiglu(int32_t activation) { return activation == static_cast<int32_t>(Activation::kSwiglu); }

// A number of features, which a launch takes, and a multiple of `unit`: throws std::invalid_argument for anything else.
void check_features(char const* name, int32_t value, int32_t unit);

// What an attribute `kernels` must be: throws std::invalid_argument for anything else. And what it means.
void check_kernels(Int32Array const& kernels);
std::vector<GemmChoiceUpTo> choices_of(Int32Array const& kernels);

class GemmPlugin : public PluginBase<GemmAttributes> {
 public:
  static constexpr char const* kName = "Gemm";
  static constexpr char const* kVersion = "1";
  static AttributeSchema const& schema();

  explicit GemmPlugin(Attributes const& attributes);

  size_t workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const;

  // Launches the kernels for tensors of these shapes; zero rows launch nothing.
  void enqueue(Execution const& execution) const;

 private:
  GemmShape shape(Sizes const& sizes) const;
  // The workspace for `shape`, which may be another than `described`, the one that a message is to name.
  size_t needed_workspace(GemmShape const& shape, GemmShape const& described) const;

  std::vector<GemmChoiceUpTo> choices_;
};

// The same plug-in under a name that no operator of ONNX has, for networks from ONNX files: some parsers take a node
// called Gemm for ONNX's operator, whatever its domain.
class QwenGemmPlugin : public GemmPlugin {
 public:
  static constexpr char const* kName = "QwenGemm";
  using GemmPlugin::GemmPlugin;
};

}  // namespace qwen_plugins
