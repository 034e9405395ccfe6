// The life of every plug-in on TensorRT 10 and 11, driven as TensorRT drives it: entry points, creator, build phase,
// clone, fields out and in, runtime phase, and what must fail.
#include <cstring>
#include <limits>
#include <memory>

#include "expected_launches.h"
#include "recorded_launches.h"
#include "tensorrt_double.h"

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

using namespace nvinfer1;

IPluginCreatorV3One& creator_of(bool quantization) {
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  CHECK(count == 2);
  IPluginCreatorInterface* creator = creators[quantization ? 1 : 0];
  CHECK(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
  return static_cast<IPluginCreatorV3One&>(*creator);
}

template <typename Capability>
Capability& capability(IPluginV3& plugin, PluginCapabilityType type, char const* kind) {
  IPluginCapability* found = plugin.getCapabilityInterface(type);
  CHECK(found != nullptr);
  InterfaceInfo const info = found->getInterfaceInfo();
  CHECK(std::strcmp(info.kind, kind) == 0 && info.major == 1 && info.minor == 0);
  return static_cast<Capability&>(*found);
}

IPluginV3OneBuild& build_of(IPluginV3& plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
}

IPluginV3OneRuntime& runtime_of(IPluginV3& plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
}

void check_creators() {
  char const* const names[] = {"RmsNorm", "RmsNormQuantization"};
  int32_t const field_counts[] = {6, 9};
  for (int i = 0; i < 2; ++i) {
    IPluginCreatorV3One& creator = creator_of(i == 1);
    CHECK(std::strcmp(creator.getPluginName(), names[i]) == 0);
    CHECK(std::strcmp(creator.getPluginVersion(), "1") == 0);
    CHECK(std::strcmp(creator.getPluginNamespace(), "qwen_plugins") == 0);
    PluginFieldCollection const* fields = creator.getFieldNames();
    CHECK(fields->nbFields == field_counts[i]);
    CHECK(std::strcmp(fields->fields[0].name, "eps") == 0 && fields->fields[0].type == PluginFieldType::kFLOAT32);
    CHECK(std::strcmp(fields->fields[1].name, "type_id") == 0 && fields->fields[1].type == PluginFieldType::kINT32);
  }
}

std::unique_ptr<IPluginV3> create(Mode& mode) {
  std::unique_ptr<IPluginV3> plugin(
      creator_of(mode.quantization).createPlugin("layer", mode.fields.collection(), TensorRTPhase::kBUILD));
  CHECK(plugin != nullptr);
  return plugin;
}

void check_core(IPluginV3& plugin, Mode const& mode) {
  CHECK(std::strcmp(plugin.getInterfaceInfo().kind, "PLUGIN") == 0);
  auto& core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
  CHECK(std::strcmp(core.getPluginName(), mode.quantization ? "RmsNormQuantization" : "RmsNorm") == 0);
  CHECK(std::strcmp(core.getPluginVersion(), "1") == 0);
  CHECK(std::strcmp(core.getPluginNamespace(), "qwen_plugins") == 0);
  CHECK(plugin.getCapabilityInterface(static_cast<PluginCapabilityType>(9)) == nullptr);
}

void check_types(IPluginV3OneBuild& build, Mode const& mode) {
  auto const output_count = static_cast<int32_t>(mode.outputs.size());
  CHECK(build.getNbOutputs() == output_count);
  std::vector<DataType> inputs;
  for (PluginTensorDesc const& desc : mode.inputs) {
    inputs.push_back(desc.type);
  }
  std::vector<DataType> outputs(mode.outputs.size());
  CHECK(build.getOutputDataTypes(outputs.data(), output_count, inputs.data(), static_cast<int32_t>(inputs.size())) ==
        0);
  for (size_t i = 0; i < outputs.size(); ++i) {
    CHECK(outputs[i] == mode.outputs[i].type);
  }
}

void check_shapes(IPluginV3OneBuild& build, Mode const& mode) {
  ShapeExpressions builder;
  std::vector<DimsExprs> inputs;
  for (PluginTensorDesc const& desc : mode.inputs) {
    bool const like_x = desc.dims.nbDims == 3;
    inputs.push_back(like_x ? builder.shape({-1, 3, 64}) : builder.shape({desc.dims.d[0]}));
  }
  std::vector<DimsExprs> outputs(mode.outputs.size());
  CHECK(build.getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs.data(),
                              static_cast<int32_t>(outputs.size()), builder) == 0);
  for (size_t i = 0; i < outputs.size(); ++i) {
    CHECK(outputs[i].nbDims == 3 && outputs[i].d[0] == inputs[0].d[0] && outputs[i].d[1] == inputs[0].d[1]);
    CHECK(outputs[i].d[2]->getConstantValue() == mode.outputs[i].dims.d[2]);
  }
}

// Every type and format at every position: exactly one pair fits.
void check_format_table(IPluginV3OneBuild& build, Mode const& mode) {
  std::vector<DynamicPluginTensorDesc> tensors;
  for (auto const* descs : {&mode.inputs, &mode.outputs}) {
    for (PluginTensorDesc const& desc : *descs) {
      tensors.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
  }
  auto const inputs = static_cast<int32_t>(mode.inputs.size());
  auto const outputs = static_cast<int32_t>(mode.outputs.size());
  for (int32_t position = 0; position < inputs + outputs; ++position) {
    std::vector<DynamicPluginTensorDesc> asked = tensors;
    for (int type = 0; type <= 11; ++type) {
      for (int format = 0; format <= 12; ++format) {
        asked[position].desc.type = static_cast<DataType>(type);
        asked[position].desc.format = static_cast<TensorFormat>(format);
        bool const expected = asked[position].desc.type == tensors[position].desc.type && format == 0;
        CHECK(build.supportsFormatCombination(position, asked.data(), inputs, outputs) == expected);
      }
    }
  }
  CHECK(build.configurePlugin(tensors.data(), inputs, tensors.data() + inputs, outputs) == 0);
  CHECK(build.getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs, outputs) == 0);
}

// What TensorRT does between the phases: the fields are copied into the engine and come back from it.
std::unique_ptr<IPluginV3> serialise_and_create(IPluginV3& plugin, Mode const& mode) {
  PluginFieldCollection const* fields = runtime_of(plugin).getFieldsToSerialize();
  std::vector<std::string> names;
  std::vector<std::vector<char>> values;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    names.emplace_back(fields->fields[i].name);
    auto const* data = static_cast<char const*>(fields->fields[i].data);
    values.emplace_back(data, data + 4 * fields->fields[i].length);
  }
  Fields copy;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    copy.add(names[i].c_str(), values[i].data(), fields->fields[i].type, fields->fields[i].length);
  }
  std::unique_ptr<IPluginV3> made(
      creator_of(mode.quantization).createPlugin("layer", copy.collection(), TensorRTPhase::kRUNTIME));
  CHECK(made != nullptr);
  return made;
}

void check_runtime(IPluginV3& plugin, Mode const& mode) {
  IPluginV3OneRuntime& runtime = runtime_of(plugin);
  auto const inputs = static_cast<int32_t>(mode.inputs.size());
  auto const outputs = static_cast<int32_t>(mode.outputs.size());
  CHECK(runtime.onShapeChange(mode.inputs.data(), inputs, mode.outputs.data(), outputs) == 0);
  check_launch(mode, [&](void* const* in, void* const* out) {
    return runtime.enqueue(mode.inputs.data(), mode.outputs.data(), in, out, nullptr,
                           static_cast<cudaStream_t>(address(0x5EAD)));
  });
}

void check_life(Mode& mode) {
  std::unique_ptr<IPluginV3> plugin = create(mode);
  check_core(*plugin, mode);
  check_types(build_of(*plugin), mode);
  check_shapes(build_of(*plugin), mode);
  check_format_table(build_of(*plugin), mode);
  std::unique_ptr<IPluginV3> clone(plugin->clone());
  plugin.reset();
  check_types(build_of(*clone), mode);
  std::unique_ptr<IPluginV3> deserialised = serialise_and_create(*clone, mode);
  clone.reset();
  std::unique_ptr<IPluginV3> attached(runtime_of(*deserialised).attachToContext(nullptr));
  deserialised.reset();
  check_runtime(*attached, mode);
}

void check_zero_volume(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, false);
  std::unique_ptr<IPluginV3> plugin = create(mode);
  recorded = {};
  PluginTensorDesc const inputs[] = {tensor(DataType::kHALF, {0, 3, 64}), tensor(DataType::kHALF, {64})};
  void* none[2] = {};
  CHECK(runtime_of(*plugin).enqueue(inputs, inputs, none, none, nullptr, nullptr) == 0);
  CHECK(recorded.count == 0 && log.is_empty());
}

void check_bad_fields(Log& log) {
  for (BadFields& bad : bad_fields_of_both_plugins()) {
    // The list names a field of the quantizing plug-in only, so that one is asked.
    CHECK(creator_of(true).createPlugin("layer", bad.fields.collection(), TensorRTPhase::kBUILD) == nullptr);
    CHECK(log.got_one_error_with(bad.message));
  }
  for (bool const quantization : {false, true}) {
    CHECK(creator_of(quantization).createPlugin("layer", nullptr, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(log.got_one_error_with("no field collection"));
    PluginFieldCollection const dangling{3, nullptr};
    CHECK(creator_of(quantization).createPlugin("layer", &dangling, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(log.got_one_error_with("no field collection"));
  }
  Fields bad_out_type = Fields().add("type_id", 1).add("dyn_act_scaling", 1).add("out_type_id", 1);
  CHECK(creator_of(true).createPlugin("layer", bad_out_type.collection(), TensorRTPhase::kBUILD) == nullptr);
  CHECK(log.got_one_error_with("'out_type_id' is 1; expected 2 (int8), 6 (float8_e4m3fn)"));
}

void check_bad_shapes(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, true);
  std::unique_ptr<IPluginV3> plugin = create(mode);
  ShapeExpressions builder;
  DimsExprs outputs[3];
  auto fails = [&](std::vector<DimsExprs> inputs, int32_t output_count, char const* message) {
    CHECK(build_of(*plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs,
                                            output_count, builder) != 0);
    CHECK(log.got_one_error_with(message));
  };
  DimsExprs const x = builder.shape({-1, 64});
  fails({x, builder.shape({64})}, 2, "got 2 inputs; expected 3 with these fields: x, weight, residual");
  fails({x, builder.shape({63}), x}, 2, "input 'weight' has shape [63]; expected [last dimension of x]");
  fails({x, builder.shape({1, 64}), x}, 2, "input 'weight' has shape [1, 64]");
  fails({x, builder.shape({64}), builder.shape({-1, 32})}, 2, "input 'residual' has shape [?, 32]");
  fails({x, builder.shape({64}), builder.shape({64})}, 2, "input 'residual' has shape [64]");
  fails({builder.shape({}), builder.shape({64}), x}, 2, "input 'x' has 0 dimensions");
  fails({x, builder.shape({64}), x}, 3, "there is no output 2");
}

void check_bad_runtime(Log& log) {
  Mode mode = rms_norm_mode(DataType::kHALF, DataType::kHALF, false);
  std::unique_ptr<IPluginV3> plugin = create(mode);
  IPluginV3OneRuntime& runtime = runtime_of(*plugin);
  PluginTensorDesc const wrong[] = {tensor(DataType::kHALF, {2, 64}), tensor(DataType::kHALF, {32})};
  void* none[2] = {};
  recorded = {};
  CHECK(runtime.onShapeChange(wrong, 2, wrong, 1) != 0);
  CHECK(log.got_one_error_with("input 'weight' has shape [32]"));
  CHECK(runtime.enqueue(wrong, wrong, none, none, nullptr, nullptr) != 0);
  CHECK(log.got_one_error_with("input 'weight' has shape [32]"));
  CHECK(recorded.count == 0);
  recorded.answer = cudaErrorInvalidValue;
  CHECK(runtime.enqueue(mode.inputs.data(), mode.outputs.data(), none, none, nullptr, nullptr) != 0);
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
  check_bad_shapes(log);
  check_bad_runtime(log);
  setLoggerFinder(nullptr);
  std::printf("%d lives of plug-ins passed\n", lives);
  return 0;
}
