// The GptAttention plug-in for every version of TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>

#include "kernels/attention/heads.h"
#include "plugins/plugin_base.h"

namespace qwen_plugins {

// TensorRT-LLM's numbers.
enum class PositionEmbedding : int32_t { kLearnedAbsolute = 0, kRopeGptJ = 1, kRopeGptNeox = 2 };

struct GptAttentionAttributes {
  int32_t type_id = -1;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_size = 0;
  int32_t rotary_embedding_dim = 0;
  int32_t position_embedding_type = static_cast<int32_t>(PositionEmbedding::kLearnedAbsolute);
  float q_scaling = 1.0F;
  int32_t query_scale = 0;
  int32_t qk_norm = 0;
  float norm_eps = 1e-6F;
};

class GptAttentionPlugin : public PluginBase<GptAttentionAttributes> {
 public:
  static constexpr char const* kName = "GptAttention";
  static constexpr char const* kVersion = "1";
  static AttributeSchema const& schema();

  explicit GptAttentionPlugin(Attributes const& attributes);

  void check_sizes(Sizes const& sizes) const;
  size_t workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const;

  // Launches the kernel for decoding where there are as many tokens as sequences, else those for prompts. Copies the
  // cache first unless past and present are the same memory.
  void enqueue(Execution const& execution) const;

 private:
  bool lengths_are_valid(Execution const& execution, Sizes const& sizes) const;
  AttentionHeads heads(Execution const& execution) const;
  template <typename Params>
  void set_common(Execution const& execution, Sizes const& sizes, Params& params) const;
};

}  // namespace qwen_plugins
