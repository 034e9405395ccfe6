#include "gpt_attention_plugin.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/attention/decode.h"
#include "kernels/attention/prefill.h"

namespace qwen_plugins {
namespace {

using nvinfer1::PluginFieldType;
using Attributes = GptAttentionAttributes;

[[noreturn]] void refuse(std::string const& message) { throw std::invalid_argument(message); }

int64_t packed_heads(Attributes const& attributes) {
  return int64_t{attributes.num_heads} + 2 * int64_t{attributes.num_kv_heads};
}

void check_rotary_embedding(Attributes const& attributes) {
  int32_t const dim = attributes.rotary_embedding_dim;
  if (dim < 0 || dim > attributes.head_size || dim % 2 != 0) {
    refuse("field 'rotary_embedding_dim' is " + std::to_string(dim) +
           "; expected an even number from 0 to head_size, " + std::to_string(attributes.head_size));
  }
  constexpr auto kLearnedAbsolute = static_cast<int32_t>(PositionEmbedding::kLearnedAbsolute);
  require_one_of("position_embedding_type", attributes.position_embedding_type,
                 {kLearnedAbsolute, static_cast<int32_t>(PositionEmbedding::kRopeGptJ),
                  static_cast<int32_t>(PositionEmbedding::kRopeGptNeox)});
  bool const learned = attributes.position_embedding_type == kLearnedAbsolute;
  if (learned != (dim == 0)) {
    refuse("field 'position_embedding_type' is " + std::to_string(attributes.position_embedding_type) +
           " and 'rotary_embedding_dim' " + std::to_string(dim) +
           "; expected 0 (learned_absolute) with 0, or 1 (rope_gptj) or 2 (rope_gpt_neox) with more");
  }
}

Attributes checked(Attributes attributes) {
  require_type("type_id", attributes.type_id, floating_types());
  require_positive("num_heads", attributes.num_heads);
  if (attributes.num_heads > kMaxHeads) {
    refuse("field 'num_heads' is " + std::to_string(attributes.num_heads) + "; expected at most " +
           std::to_string(kMaxHeads));
  }
  require_positive("num_kv_heads", attributes.num_kv_heads);
  if (attributes.num_heads % attributes.num_kv_heads != 0) {
    refuse("field 'num_kv_heads' is " + std::to_string(attributes.num_kv_heads) +
           "; expected a divisor of num_heads, " + std::to_string(attributes.num_heads));
  }
  require_one_of("head_size", attributes.head_size, {kHeadSizes.begin(), kHeadSizes.end()});
  check_rotary_embedding(attributes);
  require_positive("q_scaling", attributes.q_scaling);
  require_flag("query_scale", attributes.query_scale);
  require_flag("qk_norm", attributes.qk_norm);
  require_positive("norm_eps", attributes.norm_eps);
  return attributes;
}

Attributes checked_pages(Attributes const& attributes) {
  require_one_of("tokens_per_block", attributes.tokens_per_block, {kPageSize});
  require_one_of("kv_cache_type", attributes.kv_cache_type,
                 {static_cast<int32_t>(CacheDataType::kSame), static_cast<int32_t>(CacheDataType::kInt8),
                  static_cast<int32_t>(CacheDataType::kFloat8E4M3)});
  require_one_of("context_type", attributes.context_type, {0, 1, 2});
  return attributes;
}

// The type and the shape of past and present. Pages of 8-bit elements are int32 to TensorRT, which would rewrite int8.
std::pair<nvinfer1::DataType, Pattern> cache_role(Attributes const& attributes) {
  auto const type = static_cast<nvinfer1::DataType>(attributes.type_id);
  int64_t const heads = attributes.num_kv_heads;
  int64_t const head_size = attributes.head_size;
  int64_t const positions = attributes.tokens_per_block;
  if (positions == 0) {
    return {type, {"max_batch", 2, heads, "max_positions", head_size}};
  }
  if (attributes.kv_cache_type == static_cast<int32_t>(CacheDataType::kSame)) {
    return {type, {"num_pages", 2, heads, positions, head_size}};
  }
  // Of each head's keys and of its values the codes, four in a word, and a float32 scale for each position.
  int64_t const words = checked_product("words of a page", {2 * heads, positions, head_size / 4 + 1});
  return {nvinfer1::DataType::kINT32, {"num_pages", words}};
}

TensorRoles make_roles(Attributes const& attributes) {
  using nvinfer1::DataType;
  auto const type = static_cast<DataType>(attributes.type_id);
  int64_t const head_size = attributes.head_size;
  auto const [cache_type, cache] = cache_role(attributes);
  std::vector<TensorRole> inputs{
      {"qkv", type, {"tokens", packed_heads(attributes) * head_size}},
      {"past_key_value", cache_type, cache},
      {"cu_seqlens", DataType::kINT32, {Dimension(1, "sequences", 1)}},
      {"past_lengths", DataType::kINT32, {"sequences"}},
  };
  if (attributes.tokens_per_block != 0) {
    inputs.push_back({"pages", DataType::kINT32, {"sequences", "max_pages"}});
  }
  inputs.push_back({"rotary_offsets", DataType::kINT32, {"sequences"}});
  if (attributes.rotary_embedding_dim != 0) {
    inputs.push_back({"rotary_table", DataType::kFLOAT, {"rows", attributes.rotary_embedding_dim}});
  }
  inputs.push_back({"semaphores", DataType::kINT32, {"max_batch", attributes.num_heads}});
  if (attributes.query_scale != 0) {
    inputs.push_back({"query_scale", DataType::kFLOAT, {"rows"}});
  }
  if (attributes.qk_norm != 0) {
    inputs.push_back({"q_norm_weight", type, {head_size}});
    inputs.push_back({"k_norm_weight", type, {head_size}});
  }
  TensorRole context{"context", type, {"tokens", attributes.num_heads * head_size}};
  if (attributes.context_type != 0) {
    inputs.push_back({"context_scale", DataType::kFLOAT, {1}, true});
    context = {"context", DataType::kINT32, {"tokens", attributes.num_heads * head_size / kCodesOfInt32}};
  }
  return {inputs,
          {context, {"present_key_value", cache_type, cache}},
          {{"tokens", 0, kMaxPrefillTokens},
           {"sequences", 0, kMaxDecodeSequences},
           {"max_positions", 1, kMaxInt32},
           {"num_pages", 1, kMaxInt32},
           {"max_pages", 1, kMaxInt32 / std::max(attributes.tokens_per_block, 1)},
           {"rows", 0, kMaxInt32}}};
}

void copy_cache(void const* past, void* present, Sizes const& sizes, Attributes const& attributes,
                cudaStream_t stream) {
  auto const bytes = static_cast<size_t>(checked_product(
      "bytes of past_key_value", {sizes["max_batch"], 2, attributes.num_kv_heads, sizes["max_positions"],
                                  attributes.head_size, size_of(static_cast<DataType>(attributes.type_id))}));
  check_cuda(copy_async(present, past, bytes, cudaMemcpyDeviceToDevice, stream),
             [&] { return "copy of " + std::to_string(bytes) + " bytes of past to present_key_value"; });
}

// More sequences than a launch for prompts takes can only decode.
void check_prompts(int64_t tokens, int64_t sequences) {
  if (tokens != sequences && sequences > kMaxPrefillSequences) {
    refuse("'past_lengths' has " + std::to_string(sequences) + " sequences and 'qkv' " + std::to_string(tokens) +
           " tokens; expected at most " + std::to_string(kMaxPrefillSequences) +
           " sequences, or one token for each of them");
  }
}

std::vector<int32_t> copy_to_host(void const* values, int64_t count, cudaStream_t stream) {
  std::vector<int32_t> host(static_cast<size_t>(count));
  check_cuda(copy_async(host.data(), values, host.size() * sizeof(int32_t), cudaMemcpyDeviceToHost, stream),
             [] { return "reading the lengths (only a deserialised engine can be captured)"; });
  check_cuda(synchronize(stream), [] { return "reading the lengths"; });
  return host;
}

std::vector<AttributeSpec> attributes_of_all_versions() {
  return {
      {"type_id", PluginFieldType::kINT32, offsetof(Attributes, type_id), true},
      {"num_heads", PluginFieldType::kINT32, offsetof(Attributes, num_heads), true},
      {"num_kv_heads", PluginFieldType::kINT32, offsetof(Attributes, num_kv_heads), true},
      {"head_size", PluginFieldType::kINT32, offsetof(Attributes, head_size), true},
      {"rotary_embedding_dim", PluginFieldType::kINT32, offsetof(Attributes, rotary_embedding_dim), false},
      {"position_embedding_type", PluginFieldType::kINT32, offsetof(Attributes, position_embedding_type), false},
      {"q_scaling", PluginFieldType::kFLOAT32, offsetof(Attributes, q_scaling), false},
      {"query_scale", PluginFieldType::kINT32, offsetof(Attributes, query_scale), false},
      {"qk_norm", PluginFieldType::kINT32, offsetof(Attributes, qk_norm), false},
      {"norm_eps", PluginFieldType::kFLOAT32, offsetof(Attributes, norm_eps), false},
  };
}

}  // namespace

AttributeSchema const& GptAttentionPlugin::schema() {
  static AttributeSchema const schema{kName, 1, attributes_of_all_versions()};
  return schema;
}

GptAttentionPlugin::GptAttentionPlugin(Attributes const& attributes) : PluginBase(checked(attributes), make_roles) {}

AttributeSchema const& PagedGptAttentionPlugin::schema() {
  static AttributeSchema const schema = [] {
    std::vector<AttributeSpec> specs = attributes_of_all_versions();
    specs.push_back({"tokens_per_block", PluginFieldType::kINT32, offsetof(Attributes, tokens_per_block), true});
    specs.push_back({"kv_cache_type", PluginFieldType::kINT32, offsetof(Attributes, kv_cache_type), false});
    specs.push_back({"context_type", PluginFieldType::kINT32, offsetof(Attributes, context_type), false, false, 2});
    return AttributeSchema{kName, 2, specs};
  }();
  return schema;
}

PagedGptAttentionPlugin::PagedGptAttentionPlugin(Attributes const& attributes)
    : GptAttentionPlugin(checked_pages(attributes)) {}

AttentionHeads GptAttentionPlugin::heads(Execution const& execution) const {
  AttentionHeads heads;
  heads.num_heads = attributes().num_heads;
  heads.num_kv_heads = attributes().num_kv_heads;
  heads.head_size = attributes().head_size;
  heads.rotary_dim = attributes().rotary_embedding_dim;
  heads.dtype = static_cast<DataType>(attributes().type_id);
  heads.rotary_table = static_cast<float const*>(input(execution, "rotary_table"));
  heads.rotary_offsets = static_cast<int32_t const*>(input(execution, "rotary_offsets"));
  bool const gpt_j = attributes().position_embedding_type == static_cast<int32_t>(PositionEmbedding::kRopeGptJ);
  heads.rotary_style = gpt_j ? RotaryStyle::kGptJ : RotaryStyle::kNeox;
  heads.query_scale = static_cast<float const*>(input(execution, "query_scale"));
  heads.q_norm_weight = input(execution, "q_norm_weight");
  heads.k_norm_weight = input(execution, "k_norm_weight");
  heads.norm_eps = attributes().norm_eps;
  return heads;
}

template <typename Params>
void GptAttentionPlugin::set_common(Execution const& execution, Sizes const& sizes, Params& params) const {
  params.heads = heads(execution);
  params.cache.data = output(execution, "present_key_value");
  if (has_pages()) {
    params.cache.max_positions = attributes().tokens_per_block;
    params.cache.dtype = static_cast<CacheDataType>(attributes().kv_cache_type);
    params.cache.pages = static_cast<int32_t const*>(input(execution, "pages"));
    params.cache.pages_row_stride = static_cast<int32_t>(sizes["max_pages"]);
  } else {
    params.cache.max_positions = static_cast<int32_t>(sizes["max_positions"]);
  }
  params.qkv = input(execution, "qkv");
  params.qkv_row_stride = packed_heads(attributes()) * attributes().head_size;
  params.context = output(execution, "context");
  params.context_scale = static_cast<float const*>(input(execution, "context_scale"));
  params.context_dtype = attributes().context_type == 1 ? DataType::kInt8 : DataType::kFloat8E4M3;
  params.past_lengths = static_cast<int32_t const*>(input(execution, "past_lengths"));
  params.sequences = static_cast<int32_t>(sizes["sequences"]);
  params.softmax_scale = 1.0F / (attributes().q_scaling * std::sqrt(static_cast<float>(attributes().head_size)));
}

void GptAttentionPlugin::check_sizes(Sizes const& sizes) const {
  int64_t const tokens = sizes["tokens"];
  int64_t const sequences = sizes["sequences"];
  int64_t const max_batch = sizes["max_batch"];
  if (sequences == Extents::kUnknown) {
    return;
  }
  if (max_batch != Extents::kUnknown && sequences > max_batch) {
    refuse("'past_lengths' has " + std::to_string(sequences) + " sequences; expected at most " +
           std::to_string(max_batch) + ", the first dimension of " + (has_pages() ? "semaphores" : "past_key_value"));
  }
  if (tokens == Extents::kUnknown) {
    return;
  }
  if (tokens < sequences) {
    refuse("'qkv' has " + std::to_string(tokens) + " tokens; expected at least one for each of the " +
           std::to_string(sequences) + " sequences");
  }
  check_prompts(tokens, sequences);
}

// The most positions of a sequence.
int64_t GptAttentionPlugin::max_positions(Sizes const& sizes) const {
  return has_pages() ? sizes["max_pages"] * attributes().tokens_per_block : sizes["max_positions"];
}

// Copies the lengths and the pages, which a launch does not check, to the host, waits for them and checks them.
bool GptAttentionPlugin::lengths_are_valid(Execution const& execution, Sizes const& sizes) const {
  int64_t const sequences = sizes["sequences"];
  auto const read = [&](char const* name, int64_t count) {
    return copy_to_host(input(execution, name), count, execution.stream);
  };
  std::vector<int32_t> const bounds = read("cu_seqlens", sequences + 1);
  std::vector<int32_t> const pasts = read("past_lengths", sequences);
  std::vector<int32_t> const offsets = read("rotary_offsets", sequences);
  bool const has_rows = attributes().rotary_embedding_dim != 0 || attributes().query_scale != 0;
  if (bounds.front() != 0 || bounds.back() != sizes["tokens"]) {
    return false;
  }
  std::vector<int64_t> ends;
  for (int64_t i = 0; i < sequences; ++i) {
    int64_t const tokens = int64_t{bounds[i + 1]} - bounds[i];
    int64_t const end = pasts[i] + tokens;
    ends.push_back(end);
    bool const fits_cache = tokens >= 1 && pasts[i] >= 0 && end <= max_positions(sizes);
    // The rows may be those of the new tokens alone, so that the offset is negative.
    bool const fits_rows = int64_t{offsets[i]} + pasts[i] >= 0 && offsets[i] + end <= (has_rows ? sizes["rows"] : 0);
    if (!fits_cache || (has_rows && !fits_rows)) {
      return false;
    }
  }
  return !has_pages() || pages_are_valid(read("pages", sequences * sizes["max_pages"]), ends, sizes);
}

// Whether the pages that hold positions up to these ends are in the cache.
bool GptAttentionPlugin::pages_are_valid(std::vector<int32_t> const& pages, std::vector<int64_t> const& ends,
                                         Sizes const& sizes) const {
  int64_t const tokens_per_block = attributes().tokens_per_block;
  auto row = pages.begin();
  for (int64_t const end : ends) {
    auto const used = (end + tokens_per_block - 1) / tokens_per_block;
    auto const is_missing = [&](int32_t page) { return page < 0 || page >= sizes["num_pages"]; };
    if (std::any_of(row, row + used, is_missing)) {
      return false;
    }
    row += sizes["max_pages"];
  }
  return true;
}

// Between the two kernels for prompts q is in the workspace where the context has no room for it.
int64_t GptAttentionPlugin::query_bytes(int64_t tokens) const {
  return checked_product("bytes of q", {tokens, attributes().num_heads, attributes().head_size,
                                        size_of(static_cast<DataType>(attributes().type_id))});
}

size_t GptAttentionPlugin::workspace_bytes(nvinfer1::PluginTensorDesc const* largest_inputs) const {
  Sizes const largest = roles().largest_sizes(largest_inputs);
  check_prompts(largest["tokens"], largest["sequences"]);
  auto const sequences = static_cast<int32_t>(largest["sequences"]);
  void const* const none[16] = {};  // no tensor has an address yet
  int64_t bytes = 0;
  check_cuda(decode_attention_workspace_bytes(heads({largest_inputs, none, nullptr, nullptr, nullptr, Phase::kBuild}),
                                              sequences, &bytes),
             [&] { return "workspace of attention of " + std::to_string(sequences) + " sequences"; });
  return static_cast<size_t>(std::max(bytes, quantizes_context() ? query_bytes(largest["tokens"]) : 0));
}

// Makes present hold what past holds, which takes nothing where both are the same memory.
void GptAttentionPlugin::continue_cache(Execution const& execution, Sizes const& sizes) const {
  void const* const past = input(execution, "past_key_value");
  void* const present = output(execution, "present_key_value");
  if (past == present) {
    return;
  }
  if (has_pages()) {
    refuse("'present_key_value' has memory of its own; expected that of 'past_key_value': bind both to one address");
  }
  copy_cache(past, present, sizes, attributes(), execution.stream);
}

void GptAttentionPlugin::enqueue(Execution const& execution) const {
  Sizes const sizes = roles().sizes(execution.input_descs);
  check_sizes(sizes);
  if (execution.phase == Phase::kBuild && !lengths_are_valid(execution, sizes)) {
    return;  // TensorRT is timing the layer, and reads no result
  }
  continue_cache(execution, sizes);
  int64_t const tokens = sizes["tokens"];
  if (tokens == 0) {
    return;
  }
  cudaError_t status = cudaSuccess;
  if (tokens == sizes["sequences"]) {
    DecodeAttentionParams params;
    set_common(execution, sizes, params);
    params.workspace = execution.workspace;
    // An input for TensorRT, which takes it as constant: every launch leaves it as it was.
    params.semaphores = static_cast<int32_t*>(const_cast<void*>(input(execution, "semaphores")));
    status = launch_decode_attention(params, execution.stream);
  } else {
    PrefillAttentionParams params;
    set_common(execution, sizes, params);
    params.cu_seqlens = static_cast<int32_t const*>(input(execution, "cu_seqlens"));
    params.tokens = tokens;
    params.queries = quantizes_context() ? execution.workspace : nullptr;
    status = launch_prefill_attention(params, execution.stream);
  }
  check_cuda(status, [&] {
    return "launch of attention of " + std::to_string(tokens) + " tokens in " + std::to_string(sizes["sequences"]) +
           " sequences";
  });
}

}  // namespace qwen_plugins
