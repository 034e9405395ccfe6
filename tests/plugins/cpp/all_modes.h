// The modes of every plug-in, the plug-ins in the order of the library, and fields that each must refuse.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "gemm_modes.h"
#include "gpt_attention_modes.h"
#include "rms_norm_modes.h"

struct ExpectedCreator {
  char const* name;
  char const* version;
  int32_t field_count;
};

inline int schema_version_of(std::string const& plugin) {
  for (char const* const grown : {"Gemm", "QwenGemm", "RmsNormQuantization", "GptAttention:2"}) {
    if (plugin == grown) {
      return 2;
    }
  }
  return 1;
}

// How a library refuses the state of another schema version.
inline std::string refused_version(char const* plugin, std::string const& found) {
  std::string const read = schema_version_of(plugin) == 1 ? " 1" : "s 1 to 2";
  return name_of(plugin) + " 'layer': serialised plug-in has " + found + "; this library reads schema version" + read +
         ". Build the engine again with the installed qwen_plugins";
}

inline std::vector<ExpectedCreator> expected_creators() {
  return {{"RmsNorm", "1", 6},
          {"RmsNormQuantization", "1", 10},
          {"Gemm", "1", 5},
          {"GptAttention", "1", 10},
          {"QwenGemm", "1", 5},
          {"GptAttention:2", "2", 13},
          {"Gemm:2", "2", 11},
          {"QwenGemm:2", "2", 11},
          {"Gemm:3", "3", 11},
          {"QwenGemm:3", "3", 11},
          {"QuantizePerToken", "1", 3},
          {"QuantizeTensor", "1", 3}};
}

inline std::vector<Mode> all_modes() {
  std::vector<Mode> all;
  for (std::vector<Mode> const& modes : {rms_norm_modes(), quantize_modes(), gemm_modes(), quantized_gemm_modes(),
                                         eight_bit_gemm_modes(), gpt_attention_modes()}) {
    all.insert(all.end(), modes.begin(), modes.end());
  }
  return all;
}

// One mode of each plug-in.
inline std::vector<Mode> first_modes() {
  using nvinfer1::DataType;
  return {rms_norm_mode(DataType::kHALF, DataType::kHALF, true),
          rms_norm_modes().back(),
          gemm_mode(DataType::kHALF, true, true, true),
          gpt_attention_mode({}),
          gpt_attention_mode(with_pages()),
          quantized_gemm_mode(DataType::kHALF, {}),
          eight_bit_gemm_mode(DataType::kHALF, {}),
          quantize_mode(DataType::kHALF, DataType::kINT8, true, true),
          quantize_mode(DataType::kHALF, DataType::kINT8, false, true)};
}

// Prints which numbers a field takes, for the Python test to compare with the package's. `creates(plugin, fields)`.
template <typename Creates>
void print_accepted(Log& log, Creates const& creates) {
  auto print = [&](char const* title, char const* plugin, auto const& fields_with) {
    std::printf("%s:", title);
    for (int32_t number = 0; number <= 512; ++number) {
      if (creates(plugin, fields_with(number))) {
        std::printf(" %d", number);
      } else {
        CHECK(log.got_one_error_with("expected one of"));
      }
    }
    std::printf("\n");
  };
  print("activation", "Gemm", [](int32_t number) { return Fields().add("type_id", 1).add("activation", number); });
  print("head_size", "GptAttention", [](int32_t number) {
    return Fields().add("type_id", 1).add("num_heads", 4).add("num_kv_heads", 2).add("head_size", number);
  });
}

// What a creator must refuse, and a part of the message that it must log.
struct BadFields {
  char const* plugin;
  Fields fields;
  char const* message;
};

inline std::vector<BadFields> bad_rms_norm_fields() {
  using nvinfer1::PluginFieldType;
  static float const eps = 1e-6F;
  static int32_t const one = 1;
  char const* const name = "RmsNormQuantization";
  auto good = [] { return Fields().add("type_id", 1).add("dyn_act_scaling", 1); };
  return {
      {name, good().add("eps", &eps, PluginFieldType::kFLOAT32, 2), "'eps' has 2 values"},
      {name, good().add("eps", &eps, PluginFieldType::kFLOAT32, 0), "'eps' has 0 values"},
      {name, good().add("eps", &eps, PluginFieldType::kFLOAT32, -1), "'eps' has -1 values"},
      {name, good().add("eps", &one, PluginFieldType::kINT32), "'eps' has type INT32; expected FLOAT32"},
      {name, good().add("eps", &one, PluginFieldType::kCHAR), "'eps' has type CHAR; expected FLOAT32"},
      {name, good().add("eps", &one, static_cast<PluginFieldType>(10)), "'eps' has type INT64; expected FLOAT32"},
      {name, good().add("eps", &one, static_cast<PluginFieldType>(99)), "'eps' has type PluginFieldType 99; expected"},
      {name, good().add("eps", nullptr, PluginFieldType::kFLOAT32), "'eps' has no data"},
      {name, good().add("eps", 0.0F), "'eps' is 0"},
      {name, good().add("eps", -1.0F), "'eps' is -1"},
      {name, good().add("eps", std::numeric_limits<float>::quiet_NaN()), "'eps' is nan"},
      {name, good().add("eps", std::numeric_limits<float>::infinity()), "'eps' is inf"},
      {name, good().add("type_id", 0), "'type_id' is given twice"},
      {name, good().add("epsilon", 1e-6F), "unknown field 'epsilon'"},
      {name, good().add(nullptr, 1e-6F), "a field has no name"},
      {name, good().add("residual", 2), "'residual' is 2; expected 0 or 1"},
      {name, good().add("unit_offset", -1), "'unit_offset' is -1; expected 0 or 1"},
      {name, good().add("weight_type_id", 3), "'weight_type_id' is 3"},
      {name, Fields().add("dyn_act_scaling", 1), "required field 'type_id' is missing"},
      {name, Fields().add("dyn_act_scaling", 1).add("type_id", 3), "'type_id' is 3; expected 0 (float32), 1 (float16)"},
      {name, Fields().add("dyn_act_scaling", 1).add("type_id", -1), "'type_id' is -1"},
      {name, good().add("int32_output", 2), "'int32_output' is 2; expected 0 or 1"},
      {name, good().add("int32_output", 1).add("out_type_id", 3), "'out_type_id' is 3; expected 2 (int8), 6 (float8"},
      {name, good().add("out_type_id", 1), "'out_type_id' is 1; expected 2 (int8)"},
      {"QuantizePerToken", Fields(), "required field 'type_id' is missing"},
      {"QuantizePerToken", Fields().add("type_id", 2), "'type_id' is 2; expected 0 (float32), 1 (float16)"},
      {"QuantizePerToken", Fields().add("type_id", 1).add("out_type_id", 0), "'out_type_id' is 0; expected 2 (int8)"},
      {"QuantizeTensor", Fields().add("type_id", 1).add("int32_output", -1), "'int32_output' is -1; expected 0 or 1"},
  };
}

inline std::vector<BadFields> bad_decoder_fields() {
  using nvinfer1::PluginFieldType;
  auto gemm = [] { return Fields().add("type_id", 1); };
  auto heads = [](int32_t num_heads, int32_t num_kv_heads, int32_t head_size) {
    return Fields()
        .add("type_id", 1)
        .add("num_heads", num_heads)
        .add("num_kv_heads", num_kv_heads)
        .add("head_size", head_size);
  };
  auto good = [&] { return heads(8, 2, 64); };
  char const* const name = "GptAttention";
  char const* const paged = "GptAttention:2";
  return {
      {"Gemm", Fields(), "required field 'type_id' is missing"},
      {"Gemm", Fields().add("type_id", 2), "'type_id' is 2; expected 0 (float32), 1 (float16)"},
      {"Gemm", gemm().add("bias", 2), "'bias' is 2; expected 0 or 1"},
      {"Gemm", gemm().add("activation", 2), "'activation' is 2; expected one of 0, 1"},
      {"Gemm", gemm().add("constant_weight", -1), "'constant_weight' is -1; expected 0 or 1"},
      {"Gemm", gemm().add_array("kernels", {16}), "'kernels' has 1 values; expected pairs"},
      {"Gemm", gemm().add_array("kernels", {0, 1}), "'kernels' has 0 rows after 0; expected more rows"},
      {"Gemm", gemm().add_array("kernels", {8, 1, 8, 2}), "'kernels' has 8 rows after 8; expected more rows"},
      {"Gemm", gemm().add_array("kernels", {8, -1}), "'kernels' has the kernel -1; expected 0 or a kernel's number"},
      {"Gemm", gemm().add_array("kernels", std::vector<int32_t>(65, 1)), "'kernels' has 65 values; expected 0 to 64"},
      {"Gemm", gemm().add("kernels", nullptr, PluginFieldType::kINT32, -1), "'kernels' has -1 values; expected 0 to"},
      {"Gemm", gemm().add("kernels", nullptr, PluginFieldType::kINT32, 2), "'kernels' has no data"},
      {"Gemm", gemm().add("kernels", 1.0F), "'kernels' has type FLOAT32; expected INT32"},
      {name, Fields().add("type_id", 1).add("num_heads", 8), "required field 'num_kv_heads' is missing"},
      {name, heads(0, 2, 64), "'num_heads' is 0; expected a number above 0"},
      {name, heads(8193, 1, 64), "'num_heads' is 8193; expected at most 8192"},
      {name, heads(8, -1, 64), "'num_kv_heads' is -1; expected a number above 0"},
      {name, heads(8, 3, 64), "'num_kv_heads' is 3; expected a divisor of num_heads, 8"},
      {name, heads(8, 2, 65), "'head_size' is 65; expected one of 32, 64, 80, 96, 128, 256"},
      {name, good().add("rotary_embedding_dim", 66), "'rotary_embedding_dim' is 66; expected an even number from 0 to"},
      {name, good().add("rotary_embedding_dim", 31), "'rotary_embedding_dim' is 31"},
      {name, good().add("rotary_embedding_dim", -2), "'rotary_embedding_dim' is -2"},
      {name, good().add("rotary_embedding_dim", 64), "'position_embedding_type' is 0 and 'rotary_embedding_dim' 64"},
      {name, good().add("position_embedding_type", 2), "'position_embedding_type' is 2 and 'rotary_embedding_dim' 0"},
      {name, good().add("position_embedding_type", 3), "'position_embedding_type' is 3; expected one of 0, 1, 2"},
      {name, good().add("q_scaling", 0.0F), "'q_scaling' is 0"},
      {name, good().add("norm_eps", -1e-6F), "'norm_eps' is -"},
      {name, good().add("qk_norm", 2), "'qk_norm' is 2; expected 0 or 1"},
      {name, good().add("query_scale", 2), "'query_scale' is 2; expected 0 or 1"},
      {name, good().add("tokens_per_block", 64), "unknown field 'tokens_per_block'"},
      {paged, good(), "required field 'tokens_per_block' is missing"},
      {paged, good().add("tokens_per_block", 0), "'tokens_per_block' is 0; expected one of 64"},
      {paged, good().add("tokens_per_block", 32), "'tokens_per_block' is 32; expected one of 64"},
      {paged, good().add("tokens_per_block", 64).add("kv_cache_type", 3), "'kv_cache_type' is 3; expected one of 0, 1"},
      {paged, good().add("tokens_per_block", 64).add("context_type", 3),
       "'context_type' is 3; expected one of 0, 1, 2"},
      {name, good().add("context_type", 1), "unknown field 'context_type'"},
      {paged, heads(8, 3, 64).add("tokens_per_block", 64), "'num_kv_heads' is 3; expected a divisor of num_heads, 8"},
  };
}

inline std::vector<BadFields> bad_quantized_gemm_fields() {
  auto fields = [](int32_t in_features, int32_t out_features) {
    return Fields().add("type_id", 1).add("in_features", in_features).add("out_features", out_features);
  };
  auto good = [&] { return fields(192, 96).add("weight_bits", 4); };
  char const* const name = "Gemm:2";
  return {
      {name, fields(192, 96), "required field 'weight_bits' is missing"},
      {name, fields(192, 96).add("weight_bits", 3), "'weight_bits' is 3; expected one of 4, 8"},
      {name, fields(0, 96).add("weight_bits", 4), "'in_features' is 0; expected a number above 0"},
      {name, fields(192, 1 << 30).add("weight_bits", 4), "'out_features' is 1073741824; expected a number up to"},
      {name, fields(192, 95).add("weight_bits", 4).add("activation", 1),
       "'out_features' is 95; expected a multiple of 2"},
      {name, good().add("group_size", 128), "'in_features' is 192; expected a multiple of 128"},
      {name, good().add("group_size", 48), "'group_size' is 48; expected one of 0, 32, 64, 128"},
      {name, good().add("zeros", 2), "'zeros' is 2; expected 0 or 1"},
      {name, good().add("scale_type_id", 0), "'scale_type_id' is 0; expected one of 1, 7"},
      {name, good().add("bias", 2), "'bias' is 2; expected 0 or 1"},
      {name, good().add("activation", 2), "'activation' is 2; expected one of 0, 1"},
      {name, good().add("constant_weight", 2), "'constant_weight' is 2; expected 0 or 1"},
      {name, good().add_array("kernels", {16}), "'kernels' has 1 values; expected pairs"},
  };
}

inline std::vector<BadFields> bad_eight_bit_gemm_fields() {
  auto fields = [](int32_t x_type, int32_t in_features, int32_t out_features) {
    return Fields()
        .add("type_id", 1)
        .add("x_type_id", x_type)
        .add("in_features", in_features)
        .add("out_features", out_features);
  };
  auto good = [&] { return fields(6, 192, 96); };
  char const* const name = "Gemm:3";
  return {
      {name, Fields().add("type_id", 1), "required field 'x_type_id' is missing"},
      {name, fields(1, 192, 96), "'x_type_id' is 1; expected 2 (int8), 6 (float8_e4m3fn)"},
      {name, fields(6, 190, 96), "'in_features' is 190; expected a multiple of 4 up to 1073741823"},
      {name, fields(2, 1 << 17, 96), "'in_features' is 131072; expected at most 131071 with int8"},
      {name, fields(6, 192, 0), "'out_features' is 0; expected a number above 0"},
      {name, fields(6, 192, 95).add("activation", 1), "'out_features' is 95; expected a multiple of 2"},
      {name, fields(6, 192, 98).add("quantize_output", 1), "'out_features' is 98; expected a multiple of 4"},
      {name, fields(6, 192, 100).add("quantize_output", 1).add("activation", 1), "is 100; expected a multiple of 8"},
      {name, good().add("group_size", 64), "'group_size' is 64; expected one of 0, 128"},
      {name, fields(2, 192, 96).add("group_size", 128), "'group_size' is 128; expected one of 0"},
      {name, good().add("has_per_token_scaling", 2), "'has_per_token_scaling' is 2; expected 0 or 1"},
      {name, good().add("quantize_output", 2), "'quantize_output' is 2; expected 0 or 1"},
      {name, good().add("bias", 2), "'bias' is 2; expected 0 or 1"},
      {name, good().add("activation", 2), "'activation' is 2; expected one of 0, 1"},
      {name, good().add("constant_weight", 2), "'constant_weight' is 2; expected 0 or 1"},
      {name, good().add_array("kernels", {16}), "'kernels' has 1 values; expected pairs"},
  };
}

inline std::vector<BadFields> all_bad_fields() {
  std::vector<BadFields> all = bad_rms_norm_fields();
  for (std::vector<BadFields> const& more :
       {bad_decoder_fields(), bad_quantized_gemm_fields(), bad_eight_bit_gemm_fields()}) {
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

// Inputs at run time that must not be launched.
struct BadShapes {
  Mode mode;
  size_t input;
  nvinfer1::PluginTensorDesc given;
  char const* message;
};

inline std::vector<BadShapes> bad_shapes_at_runtime() {
  using nvinfer1::DataType;
  DataType const half = DataType::kHALF;
  DataType const int32 = DataType::kINT32;
  Mode const rms_norm = rms_norm_mode(half, half, false);
  Mode const gemm = gemm_mode(half, true, true, true);
  Mode const attention = gpt_attention_mode({});
  Mode const paged = gpt_attention_mode(with_pages());
  Mode const eight_bits = gpt_attention_mode(with_pages(1));
  Mode const quantized = quantized_gemm_mode(half, {});
  EightBitMode blocks;
  blocks.blocks = blocks.per_token = true;
  Mode const codes = eight_bit_gemm_mode(half, {});
  Mode const codes_in_blocks = eight_bit_gemm_mode(half, blocks);
  Mode const norm_of_codes = quantization_mode(half, DataType::kFP8, true, false, false, true);
  Mode const per_token = quantize_mode(half, DataType::kINT8, true, true);
  AttentionMode quantizing = with_pages();
  quantizing.context_type = 2;
  Mode const context = gpt_attention_mode(quantizing);
  return {
      {norm_of_codes, 0, tensor(half, {2, 3, 62}), "'x' has shape [2, 3, 62]; expected [..., 4 * words]"},
      {per_token, 0, tensor(half, {2, 3, 62}), "'x' has shape [2, 3, 62]; expected [..., 4 * words]"},
      {codes, 0, tensor(int32, {5, 3, 192}), "input 'x' has shape [5, 3, 192]; expected [..., 48]"},
      {codes, 1, tensor(int32, {96, 192}), "input 'weight' has shape [96, 192]; expected [96, 48]"},
      {codes, 2, tensor(DataType::kFLOAT, {1, 2}), "input 'scales' has shape [1, 2]; expected [96]"},
      {codes, 3, tensor(DataType::kFLOAT, {15}), "input 'x_scales' has shape [15]; expected [1] or []"},
      {codes_in_blocks, 2, tensor(DataType::kFLOAT, {96}), "input 'scales' has shape [96]; expected [1, 2]"},
      {codes_in_blocks, 3, tensor(DataType::kFLOAT, {5, 2, 1}), "'x_scales' has shape [5, 2, 1]; expected [..., 1]"},
      {context, 8, tensor(DataType::kFLOAT, {2}), "input 'context_scale' has shape [2]; expected [1] or []"},
      {rms_norm, 1, tensor(half, {32}), "input 'weight' has shape [32]; expected [hidden_size], here [64]"},
      {gemm, 1, tensor(half, {48, 32}), "input 'weight' has shape [48, 32]; expected [2 * columns, in_features]"},
      {gemm, 1, tensor(half, {47, 64}), "input 'weight' has shape [47, 64]; expected [2 * columns, in_features]"},
      {gemm, 2, tensor(half, {24}), "input 'bias' has shape [24]; expected [2 * columns], here [48]"},
      {quantized, 0, tensor(half, {5, 3, 64}), "input 'x' has shape [5, 3, 64]; expected [..., 192]"},
      {quantized, 1, tensor(int32, {2, 6, 256}), "input 'weight' has shape [2, 6, 256]; expected [2, 8, 256]"},
      {quantized, 2, tensor(int32, {1, 64}), "input 'scales' has shape [1, 64]; expected [4, 64]"},
      {quantized, 3, tensor(int32, {4, 64}), "input 'zeros' has shape [4, 64]; expected [4, 32]"},
      {attention, 0, tensor(half, {7, 384}), "input 'qkv' has shape [7, 384]; expected [tokens, 640]"},
      {attention, 1, tensor(half, {4, 2, 6, 100, 64}), "expected [max_batch, 2, 2, max_positions, 64]"},
      {attention, 2, tensor(int32, {0}), "input 'cu_seqlens' has shape [0]; expected [sequences + 1]"},
      {attention, 3, tensor(int32, {4}), "input 'past_lengths' has shape [4]; expected [sequences], here [3]"},
      {attention, 6, tensor(int32, {3, 6}),
       "input 'semaphores' has shape [3, 6]; expected [max_batch, 6], here [4, 6]"},
      {paged, 1, tensor(half, {9, 2, 2, 65, 64}), "expected [num_pages, 2, 2, 64, 64]"},
      {paged, 4, tensor(int32, {4, 5}), "input 'pages' has shape [4, 5]; expected [sequences, max_pages], here [3, ?]"},
      {paged, 7, tensor(int32, {2, 6}),
       "'past_lengths' has 3 sequences; expected at most 2, the first dimension of semaphores"},
      {eight_bits, 1, tensor(int32, {9, 4096}),
       "input 'past_key_value' has shape [9, 4096]; expected [num_pages, 4352]"},
      {attention, 0, tensor(half, {2, 640}), "'qkv' has 2 tokens; expected at least one for each of the 3 sequences"},
  };
}

// Modes with tensors beyond what a launch takes, which must be refused while the engine is built and when it runs.
inline std::vector<std::pair<Mode, char const*>> modes_beyond_limits() {
  using nvinfer1::DataType;
  DataType const half = DataType::kHALF;
  DataType const int32 = DataType::kINT32;
  std::vector<std::pair<Mode, char const*>> modes;
  auto add = [&](Mode mode, std::vector<std::pair<size_t, nvinfer1::PluginTensorDesc>> const& inputs,
                 char const* message) {
    for (auto const& [input, given] : inputs) {
      mode.inputs[input] = given;
    }
    mode.dynamic.clear();
    modes.emplace_back(mode, message);
  };
  Extent const large = Extent{1} << 30;
  Mode const swiglu = gemm_mode(half, false, true, false);
  add(swiglu, {{0, tensor(half, {large, large, 16, 64})}},
      "input 'x' has shape [1073741824, 1073741824, 16, 64], where the product of its leading dimensions is at least "
      "9223372036854775807; expected 0 to 1073741823");
  add(swiglu, {{0, tensor(half, {2, large / 2, 64})}}, "is 1073741824; expected 0 to 1073741823");
  add(swiglu, {{0, tensor(half, {5, 3, 0})}, {1, tensor(half, {48, 0})}},
      "input 'x' has shape [5, 3, 0], where in_features is 0; expected 1 to 1073741823");
  add(swiglu, {{1, tensor(half, {0, 64})}}, "where columns is 0; expected 1 to 536870911");
  add(swiglu, {{1, tensor(half, {large, 64})}}, "where columns is 536870912; expected 1 to 536870911");
  add(gemm_mode(half, false, false, false), {{1, tensor(half, {large, 64})}}, "columns is 1073741824; expected 1 to");
  Mode const dynamic = quantization_mode(half, DataType::kINT8, true, false, false);
  add(dynamic, {{0, tensor(half, {2, 3, 0})}, {1, tensor(half, {0})}},
      "where hidden_size is 0; expected 1 to 2147483647");
  Mode const attention = gpt_attention_mode({});
  add(attention, {{0, tensor(half, {(1 << 21) + 1, 640})}}, "where tokens is 2097153; expected 0 to 2097152");
  add(attention, {{1, tensor(half, {4, 2, 2, 0, 64})}}, "where max_positions is 0; expected 1 to 2147483647");
  add(attention, {{2, tensor(int32, {65537})}}, "where sequences is 65536; expected 0 to 65535");
  add(attention,
      {{0, tensor(half, {20000, 640})},
       {1, tensor(half, {16385, 2, 2, 100, 64})},
       {2, tensor(int32, {16386})},
       {3, tensor(int32, {16385})},
       {4, tensor(int32, {16385})},
       {6, tensor(int32, {16385, 6})}},
      "'past_lengths' has 16385 sequences and 'qkv' 20000 tokens; expected at most 16384 sequences, or one token for");
  Mode const paged = gpt_attention_mode(with_pages());
  add(paged, {{1, tensor(half, {0, 2, 2, 64, 64})}}, "where num_pages is 0; expected 1 to 2147483647");
  add(paged, {{4, tensor(int32, {3, 1 << 25})}}, "where max_pages is 33554432; expected 1 to 33554431");
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  add(attention, {{2, tensor(int32, {(Extent{1} << 32) + 2})}}, "where sequences is 4294967297; expected 0 to 65535");
  add(attention, {{5, tensor(DataType::kFLOAT, {Extent{1} << 31, 48})}}, "where rows is 2147483648; expected 0 to");
  add(rms_norm_mode(half, half, false), {{0, tensor(half, {1, Extent{1} << 31})}},
      "where hidden_size is 2147483648; expected 0 to 2147483647");
  add(rms_norm_mode(half, half, false), {{0, tensor(half, {Extent{1} << 32, 64})}}, "is 4294967296; expected 0 to");
#endif
  return modes;
}

// Shapes that are known while the engine is built, and can't fit.
inline std::vector<BadShapes> bad_static_shapes() {
  nvinfer1::DataType const half = nvinfer1::DataType::kHALF;
  AttentionMode norms;
  norms.qk_norm = true;
  Mode small_batch = gpt_attention_mode({});
  small_batch.inputs[6] = tensor(nvinfer1::DataType::kINT32, {2, 6});
  return {
      {small_batch, 1, tensor(half, {2, 2, 2, 100, 64}), "'past_lengths' has 3 sequences; expected at most 2"},
      {gpt_attention_mode({}), 0, tensor(half, {2, 640}), "'qkv' has 2 tokens; expected at least one for each"},
      {gpt_attention_mode(norms), 7, tensor(half, {65}), "'q_norm_weight' has shape [65]; expected [64]"},
  };
}

// Maxima of a profile that do not fit together: the workspace is for the largest.
inline std::vector<Mode> modes_with_maxima_that_disagree() {
  using nvinfer1::DataType;
  DataType const half = DataType::kHALF;
  std::vector<Mode> modes;
  std::vector<Extent> lengths{65, 64, 63};
  do {
    Mode attention = gpt_attention_mode({});
    for (size_t i = 0; i < lengths.size(); ++i) {
      attention.inputs[2 + i] = tensor(DataType::kINT32, {lengths[i]});
    }
    attention.workspace_bytes =
        recorded_attention_workspace(std::max<int64_t>({lengths[0] - 1, lengths[1], lengths[2]}));
    modes.push_back(attention);
  } while (std::prev_permutation(lengths.begin(), lengths.end()));
  Mode gemm = gemm_mode(half, true, true, false);
  gemm.inputs = {tensor(half, {5, 3, 72}), tensor(half, {48, 63}), tensor(half, {96})};
  modes.push_back(gemm);
  return modes;
}

// Maxima that fit no tensor of the plug-in, and what is logged.
inline std::vector<BadShapes> bad_maxima() {
  nvinfer1::DataType const half = nvinfer1::DataType::kHALF;
  return {
      {gemm_mode(half, true, true, true), 1, tensor(half, {47, 64}), "expected [2 * columns, in_features]"},
      {gpt_attention_mode({}), 2, tensor(nvinfer1::DataType::kINT32, {0}), "expected [sequences + 1]"},
      {gpt_attention_mode({}), 0, tensor(half, {7, 384}), "expected [tokens, 640]"},
  };
}

// More than any GPU has.
constexpr size_t kTooMuchMemory = size_t{1} << 50;

inline std::vector<Mode> modes_without_rows() {
  using nvinfer1::DataType;
  DataType const half = DataType::kHALF;
  Mode rms_norm = rms_norm_mode(half, half, false);
  rms_norm.inputs[0] = tensor(half, {0, 3, 64});
  Mode gemm = gemm_mode(half, true, true, true);
  gemm.inputs[0] = tensor(half, {5, 0, 64});
  Mode quantized = quantized_gemm_mode(half, {});
  quantized.inputs[0] = tensor(half, {5, 0, 192});
  Mode attention = gpt_attention_mode({});
  attention.inputs[0] = tensor(half, {0, 640});
  attention.inputs[2] = tensor(DataType::kINT32, {1});
  attention.inputs[3] = attention.inputs[4] = tensor(DataType::kINT32, {0});
  Mode paged = gpt_attention_mode(with_pages());
  paged.inputs[0] = tensor(half, {0, 640});
  paged.inputs[2] = tensor(DataType::kINT32, {1});
  paged.inputs[3] = paged.inputs[5] = tensor(DataType::kINT32, {0});
  paged.inputs[4] = tensor(DataType::kINT32, {0, 5});
  Mode codes = eight_bit_gemm_mode(half, {});
  codes.inputs[0] = tensor(DataType::kINT32, {5, 0, 48});
  Mode per_token = quantize_mode(half, DataType::kINT8, true, true);
  per_token.inputs[0] = tensor(half, {0, 3, 64});
  return {rms_norm, gemm, quantized, attention, paged, codes, per_token};
}

// What is logged where a launcher reports an error.
inline std::vector<std::pair<Mode, char const*>> modes_and_failures() {
  nvinfer1::DataType const half = nvinfer1::DataType::kHALF;
  AttentionMode decode;
  decode.decode = true;
  return {{rms_norm_mode(half, half, false), "launch of 6 rows of 64 failed: recorded error"},
          {gemm_mode(half, false, false, true), "15 rows of 64 times [48, 64] failed: recorded error"},
          {quantize_mode(half, nvinfer1::DataType::kINT8, true, true), "launch of 6 rows of 64 failed: recorded error"},
          {eight_bit_gemm_mode(half, {}), "15 rows of 192 times 8-bit [96, 192] failed: recorded error"},
          {quantized_gemm_mode(half, {}), "15 rows of 192 times quantized [96, 192] failed: recorded error"},
          {gpt_attention_mode({}), "launch of attention of 7 tokens in 3 sequences failed: recorded error"},
          {gpt_attention_mode(decode), "launch of attention of 3 tokens in 3 sequences failed: recorded error"}};
}
