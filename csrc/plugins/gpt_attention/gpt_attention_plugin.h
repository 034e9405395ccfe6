// The GptAttention plug-in for every version of TensorRT. README.md has its inputs, outputs and attributes.
#pragma once

#include <cstdint>
#include <vector>

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
  int32_t tokens_per_block = 0;  // positions of a page of the cache; 0: the cache has no pages
  int32_t kv_cache_type = static_cast<int32_t>(CacheDataType::kSame);  // of a cache with pages
  int32_t context_type = 0;  // 0: type_id; 1: int8, 2: float8, int32 to TensorRT, four codes in each number
};

class GptAttentionPlugin : public PluginBase<GptAttentionAttributes> {
 public:
  static constexpr char const* kName = "GptAttention";
  static constexpr char const* kVersion = "1";
  static AttributeSchema const& schema();

  explicit GptAttentionPlugin(Attributes const& attributes);

  void check_sizes(Sizes const& sizes) const;
  size_t workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const;

  // Launches the kernel for decoding where there are as many tokens as sequences, else those for prompts. Unless past
  // and present are the same memory, copies a contiguous cache first, and throws for one of pages.
  void enqueue(Execution const& execution) const;

 private:
  bool quantizes_context() const { return attributes().context_type != 0; }
  bool has_pages() const { return attributes().tokens_per_block != 0; }
  int64_t max_positions(Sizes const& sizes) const;
  int64_t query_bytes(int64_t tokens) const;
  bool lengths_are_valid(Execution const& execution, Sizes const& sizes) const;
  bool pages_are_valid(std::vector<int32_t> const& pages, std::vector<int64_t> const& ends, Sizes const& sizes) const;
  void continue_cache(Execution const& execution, Sizes const& sizes) const;
  AttentionHeads heads(Execution const& execution) const;
  template <typename Params>
  void set_common(Execution const& execution, Sizes const& sizes, Params& params) const;
};

// The same attention over a cache of pages, which may have 8 bits an element, as the context may: three more fields,
// and one or two more inputs.
class PagedGptAttentionPlugin : public GptAttentionPlugin {
 public:
  static constexpr char const* kVersion = "2";
  static AttributeSchema const& schema();

  explicit PagedGptAttentionPlugin(Attributes const& attributes);
};

}  // namespace qwen_plugins
