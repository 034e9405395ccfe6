// The life of every plug-in on TensorRT 8.6, driven as TensorRT drives it: entry points, creator, build phase, clone,
// bytes out and in, runtime phase, and what must fail.
#include <algorithm>
#include <cstring>
#include <memory>

#include "all_modes.h"
#include "recorded_launches.h"
#include "tensorrt_double.h"

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count);

namespace {

using namespace nvinfer1;

struct Destroy {
  void operator()(IPluginV2DynamicExt* plugin) const { plugin->destroy(); }
};
using Plugin = std::unique_ptr<IPluginV2DynamicExt, Destroy>;

IPluginCreator& creator_of(char const* plugin) {
  int32_t count = 0;
  IPluginCreator* const* creators = getPluginCreators(count);
  IPluginCreator* const* found = std::find_if(creators, creators + count, [plugin](IPluginCreator* creator) {
    return creator->getPluginName() == name_of(plugin) && creator->getPluginVersion() == version_of(plugin);
  });
  CHECK(found != creators + count);
  return **found;
}

void check_creators() {
  int32_t count = 0;
  getPluginCreators(count);
  CHECK(count == static_cast<int32_t>(expected_creators().size()));
  for (ExpectedCreator const& expected : expected_creators()) {
    IPluginCreator& creator = creator_of(expected.name);
    CHECK(creator.getTensorRTVersion() / 100 == 86);
    CHECK(std::strcmp(creator.getPluginVersion(), expected.version) == 0);
    CHECK(std::strcmp(creator.getPluginNamespace(), "qwen_plugins") == 0);
    CHECK(creator.getFieldNames()->nbFields == expected.field_count);
  }
}

Plugin as_dynamic(IPluginV2* plugin) {
  CHECK(plugin != nullptr);
  // The top byte is the kind of plug-in, after which TensorRT casts. The function is protected in the derived class.
  CHECK(plugin->getTensorRTVersion() >> 24 == 3);
  return Plugin(static_cast<IPluginV2DynamicExt*>(plugin));
}

Plugin create(Mode& mode) {
  return as_dynamic(creator_of(mode.plugin).createPlugin("layer", mode.fields.collection()));
}

void check_types(Plugin const& plugin, Mode const& mode) {
  CHECK(plugin->getPluginType() == name_of(mode.plugin) && plugin->getPluginVersion() == version_of(mode.plugin));
  CHECK(std::strcmp(plugin->getPluginNamespace(), "qwen_plugins") == 0);
  CHECK(plugin->getNbOutputs() == static_cast<int32_t>(mode.outputs.size()));
  for (size_t i = 0; i < mode.outputs.size(); ++i) {
    CHECK(plugin->getOutputDataType(static_cast<int32_t>(i), nullptr, 0) == mode.outputs[i].type);
  }
}

void check_shapes(Plugin const& plugin, Mode const& mode) {
  ShapeExpressions builder;
  std::vector<DimsExprs> const inputs = shapes_while_building(mode, builder);
  for (size_t i = 0; i < mode.outputs.size(); ++i) {
    DimsExprs const shape = plugin->getOutputDimensions(static_cast<int32_t>(i), inputs.data(),
                                                        static_cast<int32_t>(inputs.size()), builder);
    check_shape(shape, mode.outputs[i].dims, mode, inputs);
  }
}

// Every type and format at every position: exactly one pair fits.
void check_format_table(Plugin const& plugin, Mode const& mode) {
  std::vector<PluginTensorDesc> tensors = mode.inputs;
  tensors.insert(tensors.end(), mode.outputs.begin(), mode.outputs.end());
  auto const inputs = static_cast<int32_t>(mode.inputs.size());
  auto const outputs = static_cast<int32_t>(mode.outputs.size());
  for (int32_t position = 0; position < inputs + outputs; ++position) {
    std::vector<PluginTensorDesc> asked = tensors;
    for (int type = 0; type <= 6; ++type) {
      for (int format = 0; format <= 12; ++format) {
        asked[position].type = static_cast<DataType>(type);
        asked[position].format = static_cast<TensorFormat>(format);
        bool const expected = asked[position].type == tensors[position].type && format == 0;
        CHECK(plugin->supportsFormatCombination(position, asked.data(), inputs, outputs) == expected);
      }
    }
  }
}

size_t workspace_of(Plugin const& plugin, Mode const& mode) {
  return plugin->getWorkspaceSize(mode.inputs.data(), static_cast<int32_t>(mode.inputs.size()), mode.outputs.data(),
                                  static_cast<int32_t>(mode.outputs.size()));
}

// The workspace is never less than enqueue needs: that of the largest maxima, or so much that building fails.
void check_workspace(Log& log) {
  for (Mode mode : modes_with_maxima_that_disagree()) {
    CHECK(workspace_of(create(mode), mode) == mode.workspace_bytes && log.is_empty());
  }
  for (BadShapes& bad : bad_maxima()) {
    Plugin const plugin = create(bad.mode);
    bad.mode.inputs[bad.input] = bad.given;
    CHECK(workspace_of(plugin, bad.mode) > kTooMuchMemory);
    CHECK(log.got_one_error_with(bad.message));
  }
  for (Mode mode : {gemm_mode(DataType::kHALF, false, false, true), gpt_attention_mode({})}) {
    Plugin const plugin = create(mode);
    recorded = {};
    recorded.answer = cudaErrorInvalidValue;
    CHECK(workspace_of(plugin, mode) > kTooMuchMemory);
    CHECK(log.got_one_error_with("failed: recorded error"));
  }
  recorded = {};
}

std::vector<char> bytes_of(Plugin const& plugin) {
  // One byte more shows that serialize writes no more than getSerializationSize says.
  std::vector<char> bytes(plugin->getSerializationSize() + 1, '\x5A');
  plugin->serialize(bytes.data());
  CHECK(bytes.back() == '\x5A');
  bytes.pop_back();
  return bytes;
}

int32_t enqueue(Plugin const& plugin, Mode const& mode, void* const* inputs, void* const* outputs) {
  return plugin->enqueue(mode.inputs.data(), mode.outputs.data(), inputs, outputs, workspace_address(),
                         static_cast<cudaStream_t>(stream_address()));
}

void check_life(Mode& mode) {
  Plugin plugin = create(mode);
  check_types(plugin, mode);
  check_shapes(plugin, mode);
  check_format_table(plugin, mode);
  CHECK(workspace_of(plugin, mode) == mode.workspace_bytes);
  Plugin clone(plugin->clone());
  plugin.reset();
  check_types(clone, mode);
  check_launch_while_building(mode, [&](void* const* in, void* const* out) { return enqueue(clone, mode, in, out); });
  std::vector<char> const bytes = bytes_of(clone);
  clone.reset();
  Plugin deserialised = as_dynamic(creator_of(mode.plugin).deserializePlugin("layer", bytes.data(), bytes.size()));
  CHECK(bytes_of(deserialised) == bytes);
  CHECK(deserialised->initialize() == 0);
  Plugin in_context(deserialised->clone());
  check_launch(mode, [&](void* const* in, void* const* out) { return enqueue(in_context, mode, in, out); });
  in_context->terminate();
}

Plugin at_runtime(Mode& mode) {
  std::vector<char> const bytes = bytes_of(create(mode));
  return as_dynamic(creator_of(mode.plugin).deserializePlugin("layer", bytes.data(), bytes.size()));
}

void check_zero_volume(Log& log) {
  for (Mode mode : modes_without_rows()) {
    Plugin plugin = at_runtime(mode);
    recorded = {};
    void* none[16] = {};
    CHECK(enqueue(plugin, mode, none, none) == 0);
    CHECK(recorded.count == 0 && log.is_empty());
  }
}

// Past and present in the same memory: nothing is copied.
void check_in_place() {
  Mode mode = gpt_attention_mode({});
  Plugin plugin = at_runtime(mode);
  recorded = {};
  Addresses const inputs = addresses(mode.inputs.size(), 0x10000);
  void* const outputs[] = {address(0x900000), inputs[1]};
  CHECK(enqueue(plugin, mode, inputs.data(), outputs) == 0);
  CHECK(recorded.prefill_attention.value().cache.data == inputs[1] && !recorded.copy.has_value());
}

// A cache of pages is not copied.
void check_pages_that_are_not_in_place(Log& log) {
  Mode mode = gpt_attention_mode(with_pages());
  Plugin plugin = at_runtime(mode);
  recorded = {};
  Addresses const inputs = addresses(mode.inputs.size(), 0x10000);
  Addresses const outputs = addresses(mode.outputs.size(), 0x900000);
  CHECK(enqueue(plugin, mode, inputs.data(), outputs.data()) != 0);
  CHECK(log.got_one_error_with("'present_key_value' has memory of its own; expected that of 'past_key_value'"));
  CHECK(recorded.count == 0 && !recorded.copy.has_value());
}

void check_attention_while_building() {
  for (Mode mode : {gpt_attention_mode({}), gpt_attention_mode(with_pages())}) {
    Plugin plugin = create(mode);
    check_lengths_while_building(mode,
                                 [&](void* const* in, void* const* out) { return enqueue(plugin, mode, in, out); });
  }
}

void check_bad_fields(Log& log) {
  for (BadFields& bad : all_bad_fields()) {
    CHECK(creator_of(bad.plugin).createPlugin("layer", bad.fields.collection()) == nullptr);
    CHECK(log.got_one_error_with(bad.message));
  }
  for (ExpectedCreator const& expected : expected_creators()) {
    CHECK(creator_of(expected.name).createPlugin("layer", nullptr) == nullptr);
    CHECK(log.got_one_error_with("no field collection"));
  }
  // Types that only later versions of TensorRT have.
  Fields bfloat16 = Fields().add("type_id", 7);
  CHECK(creator_of("RmsNorm").createPlugin("layer", bfloat16.collection()) == nullptr);
  CHECK(log.got_one_error_with("'type_id' is 7; expected 0 (float32), 1 (float16)"));
  Fields float8 = Fields().add("type_id", 1).add("dyn_act_scaling", 1).add("out_type_id", 6);
  CHECK(creator_of("RmsNormQuantization").createPlugin("layer", float8.collection()) == nullptr);
  CHECK(log.got_one_error_with("'out_type_id' is 6; expected 2 (int8)"));
}

void check_bad_bytes(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, true);
  std::vector<char> const good = bytes_of(create(mode));
  auto fails = [&](std::vector<char> const& bytes, char const* plugin, char const* message) {
    // A copy of exact size, so that the address sanitizer sees a read past its end.
    std::unique_ptr<char[]> copy(new char[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), copy.get());
    CHECK(creator_of(plugin).deserializePlugin("layer", copy.get(), bytes.size()) == nullptr);
    CHECK(log.got_one_error_with(message));
  };
  for (size_t size = 0; size < good.size(); ++size) {
    fails({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}, "RmsNorm", "bytes; expected 40 bytes");
  }
  std::vector<char> longer = good;
  longer.push_back(0);
  fails(longer, "RmsNorm", "has 41 bytes; expected 40 bytes");
  for (size_t i = 0; i < good.size(); ++i) {
    std::vector<char> corrupted = good;
    corrupted[i] ^= 0x10;
    fails(corrupted, "RmsNorm", "serialised plug-in");
  }
  fails(good, "RmsNormQuantization", "serialised plug-in has 6 attributes; expected 9");
  CHECK(creator_of("RmsNorm").deserializePlugin("layer", nullptr, 40) == nullptr);
  CHECK(log.got_one_error_with("has 0 bytes"));
}

// State that an older or a newer library wrote is refused for its version, before anything else is read.
void check_schema_versions(Log& log) {
  for (Mode& mode : first_modes()) {
    std::vector<char> bytes = bytes_of(create(mode));
    for (int const version : {0, schema_version_of(mode.plugin) + 1}) {
      bytes[4] = static_cast<char>(version);
      for (size_t const size : {bytes.size(), bytes.size() - 4}) {
        CHECK(creator_of(mode.plugin).deserializePlugin("layer", bytes.data(), size) == nullptr);
        CHECK(log.got_one_error_with(refused_version(mode.plugin, "schema version " + std::to_string(version))));
      }
    }
  }
}

// Gemm's state with schema version 1, as the library wrote it that had no field 'kernels': type_id 1, bias 1,
// activation 0, constant_weight 1.
void check_state_of_version_1(Log& log) {
  std::vector<unsigned char> bytes = {0x47, 0x4C, 0x50, 0x51, 1, 0, 0, 0, 4, 0, 0, 0, 0xE2, 0x54, 0x72, 0xE1,
                                      1,    0,    0,    0,    1, 0, 0, 0, 0, 0, 0, 0, 1,    0,    0,    0};
  Mode mode = gemm_mode(DataType::kHALF, true, false, true);
  Plugin plugin = as_dynamic(creator_of("Gemm").deserializePlugin("layer", bytes.data(), bytes.size()));
  check_types(plugin, mode);
  check_launch(mode, [&](void* const* in, void* const* out) { return enqueue(plugin, mode, in, out); });
  CHECK(bytes_of(plugin) == bytes_of(create(mode)));  // written anew it has the library's version
  CHECK(creator_of("Gemm").deserializePlugin("layer", bytes.data(), bytes.size() - 4) == nullptr);
  CHECK(log.got_one_error_with("has 28 bytes; expected 32 bytes"));
}

// State with an array, cut anywhere, longer or with any bit of its first bytes wrong.
void check_bad_arrays(Log& log) {
  Mode mode = gemm_mode(DataType::kHALF, true, false, true, {8, 1, 16, 2});
  std::vector<char> const good = bytes_of(create(mode));
  CHECK(good.size() == 16 + 4 * 4 + 4 + 4 * 4);
  auto fails = [&](std::vector<char> const& bytes, char const* message) {
    std::unique_ptr<char[]> copy(new char[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), copy.get());
    CHECK(creator_of("Gemm").deserializePlugin("layer", copy.get(), bytes.size()) == nullptr);
    CHECK(log.got_one_error_with(message));
  };
  for (size_t size = 0; size < good.size(); ++size) {
    fails({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)},
          size < 36 ? "bytes; expected 36 bytes" : "bytes; expected 52 bytes");
  }
  for (size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::vector<char> corrupted = good;
      corrupted[i] = static_cast<char>(corrupted[i] ^ (1 << bit));
      fails(corrupted, "serialised plug-in");
    }
  }
  std::vector<char> negative = good;
  negative[35] = '\x80';
  fails(negative, "has -2147483644 values of 'kernels'; expected 0 to 64");
}

bool creates(char const* plugin, Fields fields) {
  IPluginV2* const made = creator_of(plugin).createPlugin("layer", fields.collection());
  if (made != nullptr) {
    made->destroy();
  }
  return made != nullptr;
}

void check_bad_shapes(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, true);
  Plugin plugin = create(mode);
  ShapeExpressions builder;
  auto fails = [&](std::vector<DimsExprs> inputs, int32_t output, char const* message) {
    CHECK(plugin->getOutputDimensions(output, inputs.data(), static_cast<int32_t>(inputs.size()), builder).nbDims ==
          -1);
    CHECK(log.got_one_error_with(message));
  };
  DimsExprs const x = builder.shape({-1, 64});
  fails({x, builder.shape({64})}, 0, "got 2 inputs; expected 3 with these fields: x, weight, residual");
  fails({x, builder.shape({63}), x}, 0, "input 'weight' has shape [63]; expected [hidden_size], here [64]");
  fails({x, builder.shape({64}), builder.shape({-1, 32})}, 1, "input 'residual' has shape [?, 32]");
  fails({builder.shape({}), builder.shape({64}), x}, 0, "input 'x' has shape []; expected [..., hidden_size]");
  fails({x, builder.shape({64}), x}, 2, "there is no output 2");
}

// The shape of an output as far as the inputs' shapes are known, and the largest workspace, are refused.
void check_limits_while_building(Log& log) {
  auto refuses_shapes = [&](Mode mode, char const* message) {
    ShapeExpressions builder;
    std::vector<DimsExprs> const inputs = shapes_while_building(mode, builder);
    auto const count = static_cast<int32_t>(inputs.size());
    CHECK(create(mode)->getOutputDimensions(0, inputs.data(), count, builder).nbDims == -1);
    CHECK(log.got_one_error_with(message));
  };
  for (auto& [mode, message] : modes_beyond_limits()) {
    refuses_shapes(mode, message);
    Mode copy = mode;
    CHECK(workspace_of(create(copy), mode) > kTooMuchMemory || copy.workspace_bytes == 0);
    CHECK(copy.workspace_bytes == 0 || log.got_one_error_with(message));
  }
  for (BadShapes& bad : bad_static_shapes()) {
    bad.mode.inputs[bad.input] = bad.given;
    bad.mode.dynamic.clear();
    refuses_shapes(bad.mode, bad.message);
  }
}

void check_bad_runtime(Log& log) {
  void* none[16] = {};
  for (auto& [mode, message] : modes_beyond_limits()) {
    Mode copy = mode;
    CHECK(enqueue(at_runtime(copy), mode, none, none) != 0);
    CHECK(log.got_one_error_with(message));
  }
  for (BadShapes& bad : bad_shapes_at_runtime()) {
    Plugin plugin = at_runtime(bad.mode);
    recorded = {};
    bad.mode.inputs[bad.input] = bad.given;
    CHECK(enqueue(plugin, bad.mode, none, none) != 0);
    CHECK(log.got_one_error_with(bad.message));
    CHECK(recorded.count == 0 && !recorded.copy.has_value());
  }
  for (auto& [mode, message] : modes_and_failures()) {
    Plugin plugin = at_runtime(mode);
    recorded = {};
    recorded.answer = cudaErrorInvalidValue;
    CHECK(enqueue(plugin, mode, none, none) != 0);
    CHECK(log.got_one_error_with(message));
  }
}

}  // namespace

int main() {
  check_creators();
  Log log;
  LogFinder finder(log);
  setLoggerFinder(&finder);
  int lives = 0;
  for (Mode& mode : all_modes()) {
    check_life(mode);
    ++lives;
  }
  CHECK(log.is_empty());
  check_zero_volume(log);
  check_attention_while_building();
  check_workspace(log);
  check_in_place();
  check_pages_that_are_not_in_place(log);
  check_bad_fields(log);
  check_bad_bytes(log);
  check_schema_versions(log);
  check_state_of_version_1(log);
  check_bad_arrays(log);
  print_accepted(log, creates);
  check_bad_shapes(log);
  check_limits_while_building(log);
  check_bad_runtime(log);
  setLoggerFinder(nullptr);
  std::printf("%d lives of plug-ins passed\n", lives);
  return 0;
}
