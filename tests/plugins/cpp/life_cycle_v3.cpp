// The life of every plug-in on TensorRT 10 and 11, driven as TensorRT drives it: entry points, creator, build phase,
// clone, fields out and in, runtime phase, and what must fail.
#include <algorithm>
#include <cstring>
#include <memory>

#include "all_modes.h"
#include "recorded_launches.h"
#include "tensorrt_double.h"

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

using namespace nvinfer1;

IPluginCreatorV3One& creator_of(char const* plugin) {
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    CHECK(std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
    if (creator.getPluginName() == name_of(plugin) && creator.getPluginVersion() == version_of(plugin)) {
      return creator;
    }
  }
  CHECK(!"a creator of this name");
  std::abort();
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
  int32_t count = 0;
  getCreators(count);
  CHECK(count == static_cast<int32_t>(expected_creators().size()));
  for (ExpectedCreator const& expected : expected_creators()) {
    IPluginCreatorV3One& creator = creator_of(expected.name);
    CHECK(std::strcmp(creator.getPluginVersion(), expected.version) == 0);
    CHECK(std::strcmp(creator.getPluginNamespace(), "qwen_plugins") == 0);
    CHECK(creator.getFieldNames()->nbFields == expected.field_count);
  }
  PluginFieldCollection const* fields = creator_of("RmsNorm").getFieldNames();
  CHECK(std::strcmp(fields->fields[0].name, "eps") == 0 && fields->fields[0].type == PluginFieldType::kFLOAT32);
  CHECK(std::strcmp(fields->fields[1].name, "type_id") == 0 && fields->fields[1].type == PluginFieldType::kINT32);
}

std::unique_ptr<IPluginV3> create(Mode& mode) {
  std::unique_ptr<IPluginV3> plugin(
      creator_of(mode.plugin).createPlugin("layer", mode.fields.collection(), TensorRTPhase::kBUILD));
  CHECK(plugin != nullptr);
  return plugin;
}

void check_core(IPluginV3& plugin, Mode const& mode) {
  CHECK(std::strcmp(plugin.getInterfaceInfo().kind, "PLUGIN") == 0);
  auto& core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
  CHECK(core.getPluginName() == name_of(mode.plugin) && core.getPluginVersion() == version_of(mode.plugin));
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
  std::vector<DimsExprs> const inputs = shapes_while_building(mode, builder);
  std::vector<DimsExprs> outputs(mode.outputs.size());
  CHECK(build.getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs.data(),
                              static_cast<int32_t>(outputs.size()), builder) == 0);
  for (size_t i = 0; i < outputs.size(); ++i) {
    check_shape(outputs[i], mode.outputs[i].dims, mode, inputs);
  }
}

// As an optimization profile describes them.
std::vector<DynamicPluginTensorDesc> profile_of(Mode const& mode) {
  std::vector<DynamicPluginTensorDesc> tensors;
  for (auto const* descs : {&mode.inputs, &mode.outputs}) {
    for (PluginTensorDesc const& desc : *descs) {
      tensors.push_back({desc, desc.dims, desc.dims, desc.dims});
      Dims& dims = tensors.back().desc.dims;
      std::replace_if(dims.d, dims.d + dims.nbDims, [&](Extent extent) { return is_dynamic(mode, extent); }, -1);
    }
  }
  return tensors;
}

// Every type and format at every position: exactly one pair fits.
void check_format_table(IPluginV3OneBuild& build, Mode const& mode) {
  std::vector<DynamicPluginTensorDesc> const tensors = profile_of(mode);
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
}

size_t workspace_of(IPluginV3& plugin, Mode const& mode) {
  std::vector<DynamicPluginTensorDesc> const tensors = profile_of(mode);
  auto const inputs = static_cast<int32_t>(mode.inputs.size());
  return build_of(plugin).getWorkspaceSize(tensors.data(), inputs, tensors.data() + inputs,
                                           static_cast<int32_t>(mode.outputs.size()));
}

int32_t configure(IPluginV3& plugin, Mode const& mode) {
  std::vector<DynamicPluginTensorDesc> const tensors = profile_of(mode);
  auto const inputs = static_cast<int32_t>(mode.inputs.size());
  return build_of(plugin).configurePlugin(tensors.data(), inputs, tensors.data() + inputs,
                                          static_cast<int32_t>(mode.outputs.size()));
}

// The workspace is never less than enqueue needs: that of the largest maxima, or building fails.
void check_workspace(Log& log) {
  for (Mode mode : modes_with_maxima_that_disagree()) {
    std::unique_ptr<IPluginV3> const plugin = create(mode);
    CHECK(configure(*plugin, mode) == 0);
    CHECK(workspace_of(*plugin, mode) == mode.workspace_bytes && log.is_empty());
  }
  auto fails = [&](IPluginV3& plugin, Mode const& mode, char const* message) {
    CHECK(configure(plugin, mode) != 0);
    CHECK(log.got_one_error_with(message));
    CHECK(workspace_of(plugin, mode) > kTooMuchMemory);
    CHECK(log.got_one_error_with(message));
  };
  for (BadShapes& bad : bad_maxima()) {
    std::unique_ptr<IPluginV3> const plugin = create(bad.mode);
    bad.mode.inputs[bad.input] = bad.given;
    fails(*plugin, bad.mode, bad.message);
  }
  for (Mode mode : {gemm_mode(DataType::kHALF, false, false, true), gpt_attention_mode({})}) {
    std::unique_ptr<IPluginV3> const plugin = create(mode);
    recorded = {};
    recorded.answer = cudaErrorInvalidValue;
    fails(*plugin, mode, "failed: recorded error");
  }
  recorded = {};
}

// The fields that TensorRT copies into an engine and passes to the creator when it loads the engine.
class State {
 public:
  explicit State(IPluginV3& plugin) {
    PluginFieldCollection const* fields = runtime_of(plugin).getFieldsToSerialize();
    for (int32_t i = 0; i < fields->nbFields; ++i) {
      auto const* data = static_cast<char const*>(fields->fields[i].data);
      fields_.push_back({fields->fields[i].name, {data, data + 4 * fields->fields[i].length}, fields->fields[i].type});
    }
  }

  void erase(char const* name) { fields_.erase(find(name)); }

  void set(char const* name, int32_t value) { std::memcpy(find(name)->data.data(), &value, sizeof(value)); }

  IPluginV3* create(char const* plugin) const {
    Fields fields;
    for (Field const& field : fields_) {
      fields.add(field.name.c_str(), field.data.data(), field.type, static_cast<int32_t>(field.data.size() / 4));
    }
    return creator_of(plugin).createPlugin("layer", fields.collection(), TensorRTPhase::kRUNTIME);
  }

 private:
  struct Field {
    std::string name;
    std::vector<char> data;
    PluginFieldType type;
  };

  std::vector<Field>::iterator find(std::string const& name) {
    auto const found =
        std::find_if(fields_.begin(), fields_.end(), [&](Field const& field) { return field.name == name; });
    CHECK(found != fields_.end());
    return found;
  }

  std::vector<Field> fields_;
};

std::unique_ptr<IPluginV3> serialise_and_create(IPluginV3& plugin, Mode const& mode) {
  std::unique_ptr<IPluginV3> made(State(plugin).create(mode.plugin));
  CHECK(made != nullptr);
  return made;
}

int32_t enqueue(IPluginV3& plugin, Mode const& mode, void* const* inputs, void* const* outputs) {
  return runtime_of(plugin).enqueue(mode.inputs.data(), mode.outputs.data(), inputs, outputs, workspace_address(),
                                    static_cast<cudaStream_t>(stream_address()));
}

int32_t change_shapes(IPluginV3& plugin, Mode const& mode) {
  return runtime_of(plugin).onShapeChange(mode.inputs.data(), static_cast<int32_t>(mode.inputs.size()),
                                          mode.outputs.data(), static_cast<int32_t>(mode.outputs.size()));
}

void check_life(Mode& mode) {
  std::unique_ptr<IPluginV3> plugin = create(mode);
  check_core(*plugin, mode);
  check_types(build_of(*plugin), mode);
  check_shapes(build_of(*plugin), mode);
  check_format_table(build_of(*plugin), mode);
  CHECK(configure(*plugin, mode) == 0 && workspace_of(*plugin, mode) == mode.workspace_bytes);
  std::unique_ptr<IPluginV3> clone(plugin->clone());
  plugin.reset();
  check_types(build_of(*clone), mode);
  check_launch_while_building(mode, [&](void* const* in, void* const* out) { return enqueue(*clone, mode, in, out); });
  std::unique_ptr<IPluginV3> deserialised = serialise_and_create(*clone, mode);
  clone.reset();
  std::unique_ptr<IPluginV3> attached(runtime_of(*deserialised).attachToContext(nullptr));
  deserialised.reset();
  CHECK(change_shapes(*attached, mode) == 0);
  check_launch(mode, [&](void* const* in, void* const* out) { return enqueue(*attached, mode, in, out); });
}

void check_zero_volume(Log& log) {
  for (Mode mode : modes_without_rows()) {
    std::unique_ptr<IPluginV3> plugin = serialise_and_create(*create(mode), mode);
    recorded = {};
    void* none[16] = {};
    CHECK(enqueue(*plugin, mode, none, none) == 0);
    CHECK(recorded.count == 0 && log.is_empty());
  }
}

void check_attention_while_building() {
  for (Mode mode : {gpt_attention_mode({}), gpt_attention_mode(with_pages())}) {
    std::unique_ptr<IPluginV3> plugin = create(mode);
    check_lengths_while_building(mode,
                                 [&](void* const* in, void* const* out) { return enqueue(*plugin, mode, in, out); });
  }
}

void check_bad_fields(Log& log) {
  for (BadFields& bad : all_bad_fields()) {
    CHECK(creator_of(bad.plugin).createPlugin("layer", bad.fields.collection(), TensorRTPhase::kBUILD) == nullptr);
    CHECK(log.got_one_error_with(bad.message));
  }
  for (ExpectedCreator const& expected : expected_creators()) {
    IPluginCreatorV3One& creator = creator_of(expected.name);
    CHECK(creator.createPlugin("layer", nullptr, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(log.got_one_error_with("no field collection"));
    PluginFieldCollection const dangling{3, nullptr};
    CHECK(creator.createPlugin("layer", &dangling, TensorRTPhase::kRUNTIME) == nullptr);
    CHECK(log.got_one_error_with("no field collection"));
  }
  Fields bad_out_type = Fields().add("type_id", 1).add("dyn_act_scaling", 1).add("out_type_id", 1);
  IPluginCreatorV3One& creator = creator_of("RmsNormQuantization");
  CHECK(creator.createPlugin("layer", bad_out_type.collection(), TensorRTPhase::kBUILD) == nullptr);
  CHECK(log.got_one_error_with("'out_type_id' is 1; expected 2 (int8), 6 (float8_e4m3fn)"));
}

// State that an older or a newer library wrote is refused for its version, whatever fields it has.
void check_schema_versions(Log& log) {
  for (Mode& mode : first_modes()) {
    State state(*create(mode));
    auto refused = [&](std::string const& found) {
      CHECK(state.create(mode.plugin) == nullptr);
      CHECK(log.got_one_error_with(refused_version(mode.plugin, found)));
    };
    int const later = schema_version_of(mode.plugin) + 1;
    for (int const version : {0, later}) {
      state.set("schema_version", version);
      refused("schema version " + std::to_string(version));
    }
    state.erase("type_id");
    refused("schema version " + std::to_string(later));
    state.erase("schema_version");
    refused("no schema version");
    // It is not a field of a network.
    Fields fields = Fields().add("schema_version", 1);
    CHECK(creator_of(mode.plugin).createPlugin("layer", fields.collection(), TensorRTPhase::kBUILD) == nullptr);
    CHECK(log.got_one_error_with("unknown field 'schema_version'"));
  }
}

// Gemm's state with schema version 1, when it had no field 'kernels'.
void check_state_of_version_1() {
  Mode mode = gemm_mode(DataType::kHALF, true, false, true);
  State state(*create(mode));
  state.set("schema_version", 1);
  std::unique_ptr<IPluginV3> const plugin(state.create("Gemm"));
  CHECK(plugin != nullptr);
  check_launch(mode, [&](void* const* in, void* const* out) { return enqueue(*plugin, mode, in, out); });
}

bool creates(char const* plugin, Fields fields) {
  std::unique_ptr<IPluginV3> const made(
      creator_of(plugin).createPlugin("layer", fields.collection(), TensorRTPhase::kBUILD));
  return made != nullptr;
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
  fails({x, builder.shape({63}), x}, 2, "input 'weight' has shape [63]; expected [hidden_size], here [64]");
  fails({x, builder.shape({1, 64}), x}, 2, "input 'weight' has shape [1, 64]");
  fails({x, builder.shape({64}), builder.shape({-1, 32})}, 2, "input 'residual' has shape [?, 32]");
  fails({x, builder.shape({64}), builder.shape({64})}, 2, "input 'residual' has shape [64]");
  fails({builder.shape({}), builder.shape({64}), x}, 2, "input 'x' has shape []; expected [..., hidden_size]");
  fails({x, builder.shape({64}), x}, 3, "there is no output 2");
}

// An out_features that is known only when the engine runs: half of it is an expression.
void check_unknown_out_features() {
  Mode mode = gemm_mode(DataType::kHALF, false, true, true);
  std::unique_ptr<IPluginV3> plugin = create(mode);
  ShapeExpressions builder;
  DimsExprs const inputs[] = {builder.shape({3, 64}), builder.shape({-1, 64})};
  DimsExprs output{};
  CHECK(build_of(*plugin).getOutputShapes(inputs, 2, nullptr, 0, &output, 1, builder) == 0);
  CHECK(output.nbDims == 2 && output.d[0] == inputs[0].d[0]);
  CHECK(!output.d[1]->isConstant() && output.d[1] != inputs[1].d[0]);
}

int32_t output_shapes(IPluginV3& plugin, Mode const& mode) {
  ShapeExpressions builder;
  std::vector<DimsExprs> const inputs = shapes_while_building(mode, builder);
  std::vector<DimsExprs> outputs(mode.outputs.size());
  return build_of(plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                          outputs.data(), static_cast<int32_t>(outputs.size()), builder);
}

// Shapes beyond the limits are refused where they are known, as a profile's minimum and maximum, and at run time.
void check_limits(Log& log) {
  for (auto& [mode, message] : modes_beyond_limits()) {
    Mode copy = mode;
    std::unique_ptr<IPluginV3> const plugin = create(copy);
    CHECK(output_shapes(*plugin, mode) != 0);
    CHECK(log.got_one_error_with(message));
    CHECK(change_shapes(*plugin, mode) != 0);
    CHECK(log.got_one_error_with(message));
    CHECK(configure(*plugin, mode) != 0);
    CHECK(log.got_one_error_with(message));
  }
  for (BadShapes& bad : bad_static_shapes()) {
    std::unique_ptr<IPluginV3> const plugin = create(bad.mode);
    bad.mode.inputs[bad.input] = bad.given;
    bad.mode.dynamic.clear();
    CHECK(output_shapes(*plugin, bad.mode) != 0);
    CHECK(log.got_one_error_with(bad.message));
  }
  // A minimum alone.
  Mode mode = gemm_mode(DataType::kHALF, false, false, false);
  std::vector<DynamicPluginTensorDesc> tensors = profile_of(mode);
  tensors[1].min.d[1] = 0;
  CHECK(build_of(*create(mode)).configurePlugin(tensors.data(), 2, tensors.data() + 2, 1) != 0);
  CHECK(log.got_one_error_with("input 'weight' has shape [48, 0], where in_features is 0; expected 1 to"));
}

// TensorRT 11 passes the true types, so that a wrong one is an error; in 10 another one may be converted.
void check_input_types(Log& log) {
  for (Mode& mode : first_modes()) {
    std::unique_ptr<IPluginV3> const plugin = create(mode);
    std::vector<DataType> types;
    for (PluginTensorDesc const& desc : mode.inputs) {
      types.push_back(desc.type);
    }
    std::vector<DataType> outputs(mode.outputs.size());
    for (size_t i = 0; i < types.size(); ++i) {
      std::vector<DataType> given = types;
      given[i] = static_cast<DataType>(8);
      std::string const message = name_of(mode.plugin) + " 'layer': input '";
      int32_t const status = build_of(*plugin).getOutputDataTypes(outputs.data(), static_cast<int32_t>(outputs.size()),
                                                                  given.data(), static_cast<int32_t>(given.size()));
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 11
      CHECK(status != 0 && log.got_one_error_with(message) && log.is_empty());
#else
      CHECK(status == 0 && log.got_one_warning_with(message) && log.is_empty());
#endif
    }
  }
  Mode mode = gpt_attention_mode({});
  std::unique_ptr<IPluginV3> const plugin = create(mode);
  std::vector<DataType> given(mode.inputs.size(), DataType::kHALF);
  DataType outputs[2];
  build_of(*plugin).getOutputDataTypes(outputs, 2, given.data(), static_cast<int32_t>(given.size()));
  char const* const message = "GptAttention 'layer': input 'cu_seqlens' has type float16; expected int32";
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 11
  CHECK(log.got_one_error_with(message));
#else
  CHECK(log.got_one_warning_with(message));
#endif
}

void check_bad_runtime(Log& log) {
  void* none[16] = {};
  for (BadShapes& bad : bad_shapes_at_runtime()) {
    std::unique_ptr<IPluginV3> plugin = serialise_and_create(*create(bad.mode), bad.mode);
    recorded = {};
    bad.mode.inputs[bad.input] = bad.given;
    CHECK(change_shapes(*plugin, bad.mode) != 0);
    CHECK(log.got_one_error_with(bad.message));
    CHECK(enqueue(*plugin, bad.mode, none, none) != 0);
    CHECK(log.got_one_error_with(bad.message));
    CHECK(recorded.count == 0 && !recorded.copy.has_value());
  }
  for (auto& [mode, message] : modes_and_failures()) {
    std::unique_ptr<IPluginV3> plugin = serialise_and_create(*create(mode), mode);
    recorded = {};
    recorded.answer = cudaErrorInvalidValue;
    CHECK(enqueue(*plugin, mode, none, none) != 0);
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
  check_bad_fields(log);
  check_schema_versions(log);
  check_state_of_version_1();
  print_accepted(log, creates);
  check_bad_shapes(log);
  check_unknown_out_features();
  check_limits(log);
  check_input_types(log);
  check_bad_runtime(log);
  setLoggerFinder(nullptr);
  std::printf("%d lives of plug-ins passed\n", lives);
  return 0;
}
