// The modes of GptAttention.
#pragma once

#include <cmath>

#include "mode.h"

struct AttentionMode {
  nvinfer1::DataType type = nvinfer1::DataType::kHALF;
  bool decode = false;
  int32_t position_embedding_type = 2;
  bool query_scale = false;
  bool qk_norm = false;
  bool pages = false;
  int32_t kv_cache_type = 0;
  int32_t context_type = 0;
};

// The inputs from rotary_offsets on come after the pages.
inline size_t first_rotary_input(AttentionMode const& given) { return given.pages ? 5 : 4; }

inline void check_heads(qwen_plugins::AttentionHeads const& heads, AttentionMode const& given,
                        Addresses const& inputs) {
  size_t const rotary = first_rotary_input(given);
  CHECK(heads.num_heads == 6 && heads.num_kv_heads == 2 && heads.head_size == 64);
  CHECK(static_cast<int32_t>(heads.dtype) == int_of(given.type));
  bool const rope = given.position_embedding_type != 0;
  CHECK(heads.rotary_dim == (rope ? 48 : 0));
  CHECK(heads.rotary_table == (rope ? inputs[rotary + 1] : nullptr));
  CHECK(heads.rotary_offsets == inputs[rotary]);
  bool const gpt_j = given.position_embedding_type == 1;
  CHECK(heads.rotary_style == (gpt_j ? qwen_plugins::RotaryStyle::kGptJ : qwen_plugins::RotaryStyle::kNeox));
  CHECK(heads.query_scale == (given.query_scale ? inputs[rotary + (rope ? 3 : 2)] : nullptr));
  size_t const end = inputs.size() - (given.context_type != 0 ? 1 : 0);
  CHECK(heads.q_norm_weight == (given.qk_norm ? inputs[end - 2] : nullptr));
  CHECK(heads.k_norm_weight == (given.qk_norm ? inputs[end - 1] : nullptr));
  CHECK(heads.norm_eps == 1e-5F);
}

template <typename Params>
void check_attention(Params const& params, AttentionMode const& given, Addresses const& inputs,
                     Addresses const& outputs) {
  check_heads(params.heads, given, inputs);
  CHECK(params.qkv == inputs[0] && params.qkv_row_stride == 640);
  CHECK(params.past_lengths == inputs[3] && params.sequences == 3);
  CHECK(params.context == outputs[0] && params.cache.data == outputs[1]);
  CHECK(params.context_scale == (given.context_type != 0 ? inputs.back() : nullptr));
  CHECK(given.context_type != 1 || params.context_dtype == qwen_plugins::DataType::kInt8);
  CHECK(given.context_type != 2 || params.context_dtype == qwen_plugins::DataType::kFloat8E4M3);
  CHECK(params.cache.max_positions == (given.pages ? 64 : 100));
  CHECK(params.cache.pages == (given.pages ? inputs[4] : nullptr));
  CHECK(params.cache.pages_row_stride == (given.pages ? 5 : 0));
  CHECK(static_cast<int32_t>(params.cache.dtype) == given.kv_cache_type);
  CHECK(std::abs(params.softmax_scale - 1.0F / (1.5F * 8.0F)) < 1e-7F);
}

// Past and present: 4 caches of 100 positions, or 9 pages.
inline nvinfer1::PluginTensorDesc cache_tensor(AttentionMode const& given) {
  if (!given.pages) {
    return tensor(given.type, {4, 2, 2, 100, 64});
  }
  if (given.kv_cache_type == 0) {
    return tensor(given.type, {9, 2, 2, 64, 64});
  }
  return tensor(nvinfer1::DataType::kINT32, {9, 2 * 2 * (64 * 64 + 64 * 4) / 4});
}

// Three sequences of a batch of at most 4, 6 heads on 2 of 64 elements; 7 tokens, or 3.
inline Mode gpt_attention_mode(AttentionMode const& given) {
  using nvinfer1::DataType;
  Extent const tokens = given.decode ? 3 : 7;
  Mode mode{given.pages ? "GptAttention:2" : "GptAttention", {}, {}, {}, {100, 9, 7, 5, 3}, {}};
  mode.in_place = given.pages;
  mode.fields.add("type_id", int_of(given.type)).add("num_heads", 6).add("num_kv_heads", 2).add("head_size", 64);
  mode.fields.add("q_scaling", 1.5F).add("norm_eps", 1e-5F);
  mode.fields.add("position_embedding_type", given.position_embedding_type);
  mode.fields.add("query_scale", given.query_scale ? 1 : 0).add("qk_norm", given.qk_norm ? 1 : 0);
  mode.inputs = {tensor(given.type, {tokens, 640}), cache_tensor(given), tensor(DataType::kINT32, {4}),
                 tensor(DataType::kINT32, {3})};
  mode.outputs = {tensor(given.type, {tokens, 384}), cache_tensor(given)};
  if (given.pages) {
    mode.fields.add("tokens_per_block", 64).add("kv_cache_type", given.kv_cache_type);
    mode.inputs.push_back(tensor(DataType::kINT32, {3, 5}));
  }
  mode.inputs.push_back(tensor(DataType::kINT32, {3}));
  if (given.position_embedding_type != 0) {
    mode.fields.add("rotary_embedding_dim", 48);
    mode.inputs.push_back(tensor(DataType::kFLOAT, {200, 48}));
  }
  mode.inputs.push_back(tensor(DataType::kINT32, {4, 6}));
  if (given.query_scale) {
    mode.inputs.push_back(tensor(DataType::kFLOAT, {200}));
  }
  if (given.qk_norm) {
    mode.inputs.insert(mode.inputs.end(), 2, tensor(given.type, {64}));
  }
  mode.workspace_bytes = recorded_attention_workspace(3);
  if (given.context_type != 0) {
    mode.fields.add("context_type", given.context_type);  // not so by default
    mode.inputs.push_back(tensor(DataType::kFLOAT, {1}));
    mode.outputs[0] = tensor(DataType::kINT32, {tokens, 96});
    Extent const query_bytes = tokens * 384 * (given.type == DataType::kFLOAT ? 4 : 2);
    mode.workspace_bytes = std::max<size_t>(mode.workspace_bytes, query_bytes);
  }
  mode.runs_on_anything = false;
  mode.check_launch = [given](Addresses const& inputs, Addresses const& outputs) {
    CHECK(recorded.copy.has_value() == !given.pages);
    if (!given.pages) {
      RecordedCopy const& copy = recorded.copy.value();
      size_t const element = given.type == DataType::kFLOAT ? 4 : 2;
      CHECK(copy.to == outputs[1] && copy.from == inputs[1] && copy.bytes == 4 * 2 * 2 * 100 * 64 * element);
    }
    if (given.decode) {
      qwen_plugins::DecodeAttentionParams const& params = recorded.decode_attention.value();
      check_attention(params, given, inputs, outputs);
      CHECK(params.workspace == workspace_address());
      CHECK(params.semaphores == inputs[first_rotary_input(given) + (given.position_embedding_type != 0 ? 2 : 1)]);
    } else {
      qwen_plugins::PrefillAttentionParams const& params = recorded.prefill_attention.value();
      check_attention(params, given, inputs, outputs);
      CHECK(params.cu_seqlens == inputs[2] && params.tokens == 7);
      CHECK(params.queries == (given.context_type != 0 ? workspace_address() : nullptr));
    }
  };
  return mode;
}

inline std::vector<Mode> gpt_attention_modes() {
  std::vector<Mode> modes;
  for (nvinfer1::DataType const type : tested_types()) {
    for (bool const decode : {false, true}) {
      for (int32_t const position_embedding_type : {0, 1, 2}) {
        for (int const bits : {0, 1, 2, 3}) {
          modes.push_back(
              gpt_attention_mode({type, decode, position_embedding_type, (bits & 1) != 0, (bits & 2) != 0}));
        }
      }
      for (int32_t const kv_cache_type : {0, 1, 2}) {
        modes.push_back(gpt_attention_mode({type, decode, 2, false, false, true, kv_cache_type}));
        modes.push_back(gpt_attention_mode({type, decode, 0, true, true, true, kv_cache_type}));
        modes.push_back(gpt_attention_mode({type, decode, 2, false, false, true, kv_cache_type, 1}));
        modes.push_back(gpt_attention_mode({type, decode, 0, true, true, true, kv_cache_type, 2}));
      }
    }
  }
  return modes;
}

inline AttentionMode with_pages(int32_t kv_cache_type = 0) {
  AttentionMode mode;
  mode.pages = true;
  mode.kv_cache_type = kv_cache_type;
  return mode;
}

// Lengths of the three sequences of seven tokens, and whether a plug-in that was made from fields launches with them.
struct Lengths {
  std::vector<int32_t> cu_seqlens;
  std::vector<int32_t> past_lengths;
  std::vector<int32_t> rotary_offsets;
  bool make_sense;
  std::vector<int32_t> pages = {};
};

// Of rows of five pages, in a cache of nine.
inline std::vector<Lengths> lengths_with_pages() {
  std::vector<int32_t> const bounds{0, 2, 3, 7};
  return {
      // Up to the ends of the page table and the rotary table; what is behind a sequence's last page is not read.
      {bounds, {62, 63, 316}, {0, -63, -120}, true, {8, -1, -1, -1, -1, 0, 99, 9, 9, 9, 1, 2, 3, 4, 5}},
      {bounds, {63, 63, 316}, {0, -63, -120}, false, {8, -1, -1, -1, -1, 0, 99, 9, 9, 9, 1, 2, 3, 4, 5}},
      {bounds, {62, 63, 316}, {0, -63, -120}, false, {9, -1, -1, -1, -1, 0, 99, 9, 9, 9, 1, 2, 3, 4, 5}},
      {bounds, {62, 63, 317}, {0, -63, -121}, false, {8, -1, -1, -1, -1, 0, 99, 9, 9, 9, 1, 2, 3, 4, 5}},
      {bounds, {62, 63, 316}, {0, -64, -120}, false, {8, -1, -1, -1, -1, 0, 99, 9, 9, 9, 1, 2, 3, 4, 5}},
      {bounds, {62, 63, 316}, {0, -63, -119}, false, {8, -1, -1, -1, -1, 0, 99, 9, 9, 9, 1, 2, 3, 4, 5}},
  };
}

inline std::vector<Lengths> lengths_while_building() {
  std::vector<int32_t> const bounds{0, 2, 3, 7};
  return {
      {bounds, {0, 5, 96}, {0, 7, 100}, true},  // up to the ends of cache and table
      {bounds, {0, 5, 97}, {0, 7, 0}, false},      {bounds, {0, 5, 96}, {0, 7, 101}, false},
      {bounds, {0, -1, 0}, {0, 0, 0}, false},      {bounds, {0, 0, 0}, {-1, 0, 0}, false},
      {{1, 2, 3, 7}, {0, 0, 0}, {0, 0, 0}, false}, {{0, 2, 3, 8}, {0, 0, 0}, {0, 0, 0}, false},
      {{0, 4, 3, 7}, {0, 0, 0}, {0, 0, 0}, false}, {{0, 2, 3, 7}, {2147483647, 0, 0}, {2147483647, 0, 0}, false},
      {{0, 0, 0, 0}, {0, 0, 0}, {0, 0, 0}, false},
  };
}

// `enqueue(mode, inputs, outputs)` of a plug-in made from the fields of gpt_attention_mode({}), or of with_pages().
template <typename Enqueue>
void check_lengths_while_building(Mode const& mode, Enqueue const& enqueue) {
  Addresses const inputs = addresses(mode.inputs.size(), 0x10000);
  Addresses const outputs = output_addresses(mode, inputs);
  for (Lengths const& lengths : mode.in_place ? lengths_with_pages() : lengths_while_building()) {
    recorded = {};
    recorded.device_memory = {{inputs[2], lengths.cu_seqlens},
                              {inputs[3], lengths.past_lengths},
                              {inputs[mode.in_place ? 5 : 4], lengths.rotary_offsets}};
    if (mode.in_place) {
      recorded.device_memory[inputs[4]] = lengths.pages;
    }
    CHECK(enqueue(inputs.data(), outputs.data()) == 0);
    CHECK(recorded.count == (lengths.make_sense ? 1 : 0));
  }
}
