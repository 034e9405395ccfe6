// The life of every plug-in on TensorRT 8.6, driven as TensorRT drives it: entry points, creator, build phase, clone,
// bytes out and in, runtime phase, and what must fail.
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "expected_launches.h"
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

IPluginCreator& creator_of(bool quantization) {
  int32_t count = 0;
  IPluginCreator* const* creators = getPluginCreators(count);
  CHECK(count == 2);
  return *creators[quantization ? 1 : 0];
}

void check_creators() {
  char const* const names[] = {"RmsNorm", "RmsNormQuantization"};
  int32_t const field_counts[] = {6, 9};
  for (int i = 0; i < 2; ++i) {
    IPluginCreator& creator = creator_of(i == 1);
    CHECK(creator.getTensorRTVersion() / 100 == 86);
    CHECK(std::strcmp(creator.getPluginName(), names[i]) == 0);
    CHECK(std::strcmp(creator.getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(creator.getPluginNamespace(), "qwen_plugins") == 0);
    CHECK(creator.getFieldNames()->nbFields == field_counts[i]);
  }
}

Plugin as_dynamic(IPluginV2* plugin) {
  CHECK(plugin != nullptr);
  // The kind of plug-in is in the top byte, and TensorRT casts accordingly. The function is protected in the derived
  // one.
  CHECK(plugin->getTensorRTVersion() >> 24 == 3);
  return Plugin(static_cast<IPluginV2DynamicExt*>(plugin));
}

Plugin create(Mode& mode) {
  return as_dynamic(creator_of(mode.quantization).createPlugin("layer", mode.fields.collection()));
}

void check_types(Plugin const& plugin, Mode const& mode) {
  CHECK(std::strcmp(plugin->getPluginType(), mode.quantization ? "RmsNormQuantization" : "RmsNorm") == 0);
  CHECK(std::strcmp(plugin->getPluginNamespace(), "qwen_plugins") == 0);
  CHECK(plugin->getNbOutputs() == static_cast<int32_t>(mode.outputs.size()));
  for (size_t i = 0; i < mode.outputs.size(); ++i) {
    CHECK(plugin->getOutputDataType(static_cast<int32_t>(i), nullptr, 0) == mode.outputs[i].type);
  }
}

void check_shapes(Plugin const& plugin, Mode const& mode) {
  ShapeExpressions builder;
  std::vector<DimsExprs> inputs;
  for (PluginTensorDesc const& desc : mode.inputs) {
    bool const like_x = desc.dims.nbDims == 3;
    inputs.push_back(like_x ? builder.shape({-1, 3, 64}) : builder.shape({desc.dims.d[0]}));
  }
  for (size_t i = 0; i < mode.outputs.size(); ++i) {
    DimsExprs const shape = plugin->getOutputDimensions(static_cast<int32_t>(i), inputs.data(),
                                                        static_cast<int32_t>(inputs.size()), builder);
    CHECK(shape.nbDims == 3 && shape.d[0] == inputs[0].d[0] && shape.d[1] == inputs[0].d[1]);
    CHECK(shape.d[2]->getConstantValue() == mode.outputs[i].dims.d[2]);
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
  CHECK(plugin->getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, outputs) == 0);
}

std::vector<char> bytes_of(Plugin const& plugin) {
  // One byte more, to see that serialize stays inside what it asked for.
  std::vector<char> bytes(plugin->getSerializationSize() + 1, '\x5A');
  plugin->serialize(bytes.data());
  CHECK(bytes.back() == '\x5A');
  bytes.pop_back();
  return bytes;
}

void check_life(Mode& mode) {
  Plugin plugin = create(mode);
  check_types(plugin, mode);
  check_shapes(plugin, mode);
  check_format_table(plugin, mode);
  Plugin clone(plugin->clone());
  plugin.reset();
  check_types(clone, mode);
  std::vector<char> const bytes = bytes_of(clone);
  clone.reset();
  Plugin deserialised =
      as_dynamic(creator_of(mode.quantization).deserializePlugin("layer", bytes.data(), bytes.size()));
  CHECK(bytes_of(deserialised) == bytes);
  CHECK(deserialised->initialize() == 0);
  check_launch(mode, [&](void* const* in, void* const* out) {
    return deserialised->enqueue(mode.inputs.data(), mode.outputs.data(), in, out, nullptr,
                                 static_cast<cudaStream_t>(address(0x5EAD)));
  });
  deserialised->terminate();
}

void check_zero_volume(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, false);
  Plugin plugin = create(mode);
  recorded = {};
  PluginTensorDesc const inputs[] = {tensor(DataType::kHALF, {0, 3, 64}), tensor(DataType::kHALF, {64})};
  void* none[2] = {};
  CHECK(plugin->enqueue(inputs, inputs, none, none, nullptr, nullptr) == 0);
  CHECK(recorded.count == 0 && log.is_empty());
}

void check_bad_fields(Log& log) {
  for (BadFields& bad : bad_fields_of_both_plugins()) {
    // The list names a field of the quantizing plug-in only, so that one is asked.
    CHECK(creator_of(true).createPlugin("layer", bad.fields.collection()) == nullptr);
    CHECK(log.got_one_error_with(bad.message));
  }
  for (bool const quantization : {false, true}) {
    CHECK(creator_of(quantization).createPlugin("layer", nullptr) == nullptr);
    CHECK(log.got_one_error_with("no field collection"));
  }
  // What only later versions of TensorRT have.
  Fields bfloat16 = Fields().add("type_id", 7);
  CHECK(creator_of(false).createPlugin("layer", bfloat16.collection()) == nullptr);
  CHECK(log.got_one_error_with("'type_id' is 7; expected 0 (float32), 1 (float16)"));
  Fields float8 = Fields().add("type_id", 1).add("dyn_act_scaling", 1).add("out_type_id", 6);
  CHECK(creator_of(true).createPlugin("layer", float8.collection()) == nullptr);
  CHECK(log.got_one_error_with("'out_type_id' is 6; expected 2 (int8)"));
}

void check_bad_bytes(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, true);
  std::vector<char> const good = bytes_of(create(mode));
  auto fails = [&](std::vector<char> const& bytes, bool quantization, char const* message) {
    // A copy of exact size, so that the address sanitizer sees a read past its end.
    std::unique_ptr<char[]> copy(new char[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), copy.get());
    CHECK(creator_of(quantization).deserializePlugin("layer", copy.get(), bytes.size()) == nullptr);
    CHECK(log.got_one_error_with(message));
  };
  for (size_t size = 0; size < good.size(); ++size) {
    fails({good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size)}, false, "bytes; expected 40 bytes");
  }
  std::vector<char> longer = good;
  longer.push_back(0);
  fails(longer, false, "has 41 bytes; expected 40 bytes");
  for (size_t i = 0; i < good.size(); ++i) {
    std::vector<char> corrupted = good;
    corrupted[i] ^= 0x10;
    fails(corrupted, false, "serialised plug-in");
  }
  std::vector<char> newer = good;
  newer[4] = 2;
  fails(newer, false, "format version 2");
  fails(good, true, "6 attributes; this library reads version 1 with 9");
  CHECK(creator_of(false).deserializePlugin("layer", nullptr, 40) == nullptr);
  CHECK(log.got_one_error_with("has 0 bytes"));
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
  fails({x, builder.shape({63}), x}, 0, "input 'weight' has shape [63]; expected [last dimension of x]");
  fails({x, builder.shape({64}), builder.shape({-1, 32})}, 1, "input 'residual' has shape [?, 32]");
  fails({builder.shape({}), builder.shape({64}), x}, 0, "input 'x' has 0 dimensions");
  fails({x, builder.shape({64}), x}, 2, "there is no output 2");
}

void check_bad_runtime(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, false);
  Plugin plugin = create(mode);
  PluginTensorDesc const wrong[] = {tensor(DataType::kHALF, {2, 64}), tensor(DataType::kHALF, {32})};
  void* none[2] = {};
  recorded = {};
  CHECK(plugin->enqueue(wrong, wrong, none, none, nullptr, nullptr) != 0);
  CHECK(log.got_one_error_with("input 'weight' has shape [32]"));
  CHECK(recorded.count == 0);
  recorded.answer = cudaErrorInvalidValue;
  CHECK(plugin->enqueue(mode.inputs.data(), mode.outputs.data(), none, none, nullptr, nullptr) != 0);
  CHECK(log.got_one_error_with("launch of 6 rows of 64 failed: recorded error"));
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
  check_bad_fields(log);
  check_bad_bytes(log);
  check_bad_shapes(log);
  check_bad_runtime(log);
  setLoggerFinder(nullptr);
  std::printf("%d lives of plug-ins passed\n", lives);
  return 0;
}
