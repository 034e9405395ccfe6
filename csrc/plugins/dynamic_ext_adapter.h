// Puts a plug-in class behind TensorRT 8.6's IPluginV2DynamicExt, and its attributes behind an IPluginCreator.
#pragma once

#include <string>
#include <utility>

#include "attributes.h"
#include "log.h"
#include "plugin_base.h"
#include "tensorrt_api.h"

namespace qwen_plugins {

template <typename Plugin>
class DynamicExtAdapter final : public nvinfer1::IPluginV2DynamicExt {
 public:
  // `subject` is what messages begin with.
  DynamicExtAdapter(std::string subject, typename Plugin::Attributes const& attributes, Phase phase)
      : subject_(std::move(subject)), plugin_(attributes), phase_(phase) {}

  char const* getPluginType() const noexcept override { return Plugin::kName; }
  char const* getPluginVersion() const noexcept override { return Plugin::kVersion; }
  char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(char const* name) noexcept override { namespace_ = name == nullptr ? "" : name; }

  int32_t getNbOutputs() const noexcept override { return plugin_.roles().output_count(); }

  nvinfer1::DataType getOutputDataType(int32_t output, nvinfer1::DataType const*, int32_t) const noexcept override {
    return guarded(subject_, nvinfer1::DataType::kFLOAT, [&] { return plugin_.roles().output_type(output); });
  }

  nvinfer1::DimsExprs getOutputDimensions(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t input_count,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    return guarded(subject_, nvinfer1::DimsExprs{-1, {}}, [&] {
      plugin_.check_sizes(plugin_.roles().sizes(inputs, input_count));
      return plugin_.roles().output_shape(output, inputs, input_count, builder);
    });
  }

  bool supportsFormatCombination(int32_t position, nvinfer1::PluginTensorDesc const* tensors, int32_t,
                                 int32_t) noexcept override {
    return plugin_.roles().supports(position, tensors[position]);
  }

  // Nothing depends on the shapes before enqueue, which checks them.
  void configurePlugin(nvinfer1::DynamicPluginTensorDesc const*, int32_t, nvinfer1::DynamicPluginTensorDesc const*,
                       int32_t) noexcept override {}
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}

  // TensorRT passes the largest shapes of the profiles.
  size_t getWorkspaceSize(nvinfer1::PluginTensorDesc const* inputs, int32_t, nvinfer1::PluginTensorDesc const*,
                          int32_t) const noexcept override {
    return guarded(subject_, kImpossibleWorkspace, [&] { return plugin_.workspace_bytes(inputs); });
  }

  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const*,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override {
    return guarded(subject_, 1, [&] {
      enqueue_in_range(plugin_, {input_descs, inputs, outputs, workspace, stream, phase_});
      return 0;
    });
  }

  size_t getSerializationSize() const noexcept override {
    return serialized_size(Plugin::schema(), &plugin_.attributes());
  }

  void serialize(void* buffer) const noexcept override {
    qwen_plugins::serialize(Plugin::schema(), &plugin_.attributes(), buffer);
  }

  void destroy() noexcept override { delete this; }

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    return guarded(subject_, static_cast<DynamicExtAdapter*>(nullptr), [&] { return new DynamicExtAdapter(*this); });
  }

 private:
  DynamicExtAdapter(DynamicExtAdapter const& other)
      : nvinfer1::IPluginV2DynamicExt(),
        subject_(other.subject_),
        plugin_(other.plugin_),
        phase_(other.phase_),
        namespace_(other.namespace_) {}

  std::string subject_;
  Plugin plugin_;
  Phase phase_;
  std::string namespace_ = kPluginNamespace;
};

template <typename Plugin>
class DynamicExtCreator final : public nvinfer1::IPluginCreator {
 public:
  char const* getPluginName() const noexcept override { return Plugin::kName; }
  char const* getPluginVersion() const noexcept override { return Plugin::kVersion; }
  char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
  void setPluginNamespace(char const* name) noexcept override { namespace_ = name == nullptr ? "" : name; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &field_names_; }

  nvinfer1::IPluginV2* createPlugin(char const* layer,
                                    nvinfer1::PluginFieldCollection const* fields) noexcept override {
    return make(layer, Phase::kBuild, [&](auto& attributes) { read_fields(Plugin::schema(), fields, &attributes); });
  }

  nvinfer1::IPluginV2* deserializePlugin(char const* layer, void const* data, size_t size) noexcept override {
    return make(layer, Phase::kRuntime,
                [&](auto& attributes) { deserialize(Plugin::schema(), data, size, &attributes); });
  }

 private:
  template <typename Read>
  nvinfer1::IPluginV2* make(char const* layer, Phase phase, Read const& read) const noexcept {
    std::string const subject = subject_of(Plugin::kName, layer);
    return guarded(subject, static_cast<nvinfer1::IPluginV2*>(nullptr), [&] {
      typename Plugin::Attributes attributes;
      read(attributes);
      auto* plugin = new DynamicExtAdapter<Plugin>(subject, attributes, phase);
      plugin->setPluginNamespace(getPluginNamespace());
      return plugin;
    });
  }

  std::string namespace_ = kPluginNamespace;
  std::vector<nvinfer1::PluginField> fields_ = declare_fields(Plugin::schema());
  nvinfer1::PluginFieldCollection field_names_{static_cast<int32_t>(fields_.size()), fields_.data()};
};

}  // namespace qwen_plugins
