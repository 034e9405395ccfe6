// Puts a plug-in class behind IPluginV3 of TensorRT 10 and 11, and its attributes behind an IPluginCreatorV3One.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "attributes.h"
#include "log.h"
#include "plugin_base.h"
#include "tensorrt_api.h"

namespace qwen_plugins {

// One object implements the plug-in and its three capabilities.
template <typename Plugin>
class PluginV3Adapter final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  // `subject` is what messages begin with.
  PluginV3Adapter(std::string subject, typename Plugin::Attributes const& attributes, Phase phase)
      : subject_(std::move(subject)), plugin_(attributes), phase_(phase) {}
  PluginV3Adapter(PluginV3Adapter const&) = delete;  // the fields point into this object
  PluginV3Adapter& operator=(PluginV3Adapter const&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    return guarded(subject_, static_cast<nvinfer1::IPluginV3*>(nullptr),
                   [&] { return new PluginV3Adapter(subject_, plugin_.attributes(), phase_); });
  }

  char const* getPluginName() const noexcept override { return Plugin::kName; }
  char const* getPluginVersion() const noexcept override { return Plugin::kVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  int32_t getNbOutputs() const noexcept override { return plugin_.roles().output_count(); }

  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t output_count, nvinfer1::DataType const* inputs,
                             int32_t input_count) const noexcept override {
    return succeeded([&] {
      check_types(inputs, input_count);
      for (int32_t i = 0; i < output_count; ++i) {
        outputs[i] = plugin_.roles().output_type(i);
      }
    });
  }

  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    return succeeded([&] {
      plugin_.check_sizes(plugin_.roles().sizes(inputs, input_count));
      for (int32_t i = 0; i < output_count; ++i) {
        outputs[i] = plugin_.roles().output_shape(i, inputs, input_count, builder);
      }
    });
  }

  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t,
                                 int32_t) noexcept override {
    return plugin_.roles().supports(position, tensors[position].desc);
  }

  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override {
    return guarded(subject_, kImpossibleWorkspace, [&] { return workspace_bytes(inputs, input_count); });
  }

  // Before enqueue only the workspace depends on shapes; where its size cannot be computed, or a profile goes beyond
  // what a launch takes, the build fails here.
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept override {
    return succeeded([&] {
      plugin_.roles().largest_sizes(descs_at(&nvinfer1::DynamicPluginTensorDesc::min, inputs, input_count).data());
      workspace_bytes(inputs, input_count);
    });
  }

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const*, int32_t) noexcept override {
    return succeeded([&] { plugin_.check_sizes(plugin_.roles().sizes(inputs, input_count)); });
  }

  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const*,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return succeeded([&] { enqueue_in_range(plugin_, {input_descs, inputs, outputs, workspace, stream, phase_}); });
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_to_serialize_; }

 private:
  // From TensorRT 11 on networks are strongly typed, and the types of inputs are final. In 10 only a strongly typed
  // network fails, without a word about which input it is; another one may convert the input.
  void check_types(nvinfer1::DataType const* inputs, int32_t input_count) const {
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 11
    plugin_.roles().check_types(inputs, input_count);
#else
    try {
      plugin_.roles().check_types(inputs, input_count);
    } catch (std::invalid_argument const& mismatch) {
      log_warning(subject_, mismatch.what());
    }
#endif
  }

  // The inputs at one end of a profile's range.
  static std::vector<nvinfer1::PluginTensorDesc> descs_at(nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::* end,
                                                          nvinfer1::DynamicPluginTensorDesc const* inputs,
                                                          int32_t input_count) {
    std::vector<nvinfer1::PluginTensorDesc> descs;
    for (int32_t i = 0; i < input_count; ++i) {
      descs.push_back(inputs[i].desc);
      descs.back().dims = inputs[i].*end;
    }
    return descs;
  }

  size_t workspace_bytes(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count) const {
    return plugin_.workspace_bytes(descs_at(&nvinfer1::DynamicPluginTensorDesc::max, inputs, input_count).data());
  }

  template <typename Body>
  int32_t succeeded(Body&& body) const noexcept {
    return guarded(subject_, int32_t{1}, [&] {
      body();
      return int32_t{0};
    });
  }

  std::string subject_;
  Plugin plugin_;
  Phase phase_;
  std::vector<nvinfer1::PluginField> fields_ = write_state(Plugin::schema(), &plugin_.attributes());
  nvinfer1::PluginFieldCollection fields_to_serialize_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

template <typename Plugin>
class PluginV3Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  char const* getPluginName() const noexcept override { return Plugin::kName; }
  char const* getPluginVersion() const noexcept override { return Plugin::kVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &field_names_; }

  // The fields are those of a network's author when building, and those of getFieldsToSerialize when an engine is
  // loaded.
  nvinfer1::IPluginV3* createPlugin(char const* layer, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    std::string const subject = subject_of(Plugin::kName, layer);
    return guarded(subject, static_cast<nvinfer1::IPluginV3*>(nullptr), [&] {
      typename Plugin::Attributes attributes;
      bool const building = phase == nvinfer1::TensorRTPhase::kBUILD;
      (building ? read_fields : read_state)(Plugin::schema(), fields, &attributes);
      return new PluginV3Adapter<Plugin>(subject, attributes, building ? Phase::kBuild : Phase::kRuntime);
    });
  }

 private:
  std::vector<nvinfer1::PluginField> fields_ = declare_fields(Plugin::schema());
  nvinfer1::PluginFieldCollection field_names_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

}  // namespace qwen_plugins
