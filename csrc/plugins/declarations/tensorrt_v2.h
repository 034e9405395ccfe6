// TensorRT 8.6's plug-in interfaces: IPluginV2DynamicExt and what it derives from. See README.md.
#pragma once

#include "tensorrt_types.h"

namespace nvinfer1 {

class IGpuAllocator;

// 1000 * major + 100 * minor + patch of the oldest release that these declarations fit.
constexpr int32_t kTensorRtVersion = 8600;
// IPluginV2DynamicExt marks its kind in the top byte of getTensorRTVersion().
constexpr int32_t kDynamicExtKind = 3;

class IPluginV2 {
 public:
  virtual int32_t getTensorRTVersion() const noexcept = 0;
  virtual AsciiChar const* getPluginType() const noexcept = 0;
  virtual AsciiChar const* getPluginVersion() const noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual Dims getOutputDimensions(int32_t output, Dims const* inputs, int32_t input_count) noexcept = 0;
  virtual bool supportsFormat(DataType type, PluginFormat format) const noexcept = 0;
  virtual void configureWithFormat(Dims const* inputs, int32_t input_count, Dims const* outputs, int32_t output_count,
                                   DataType type, PluginFormat format, int32_t max_batch) noexcept = 0;
  virtual int32_t initialize() noexcept = 0;
  virtual void terminate() noexcept = 0;
  virtual size_t getWorkspaceSize(int32_t max_batch) const noexcept = 0;
  virtual int32_t enqueue(int32_t batch, void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;
  virtual size_t getSerializationSize() const noexcept = 0;
  virtual void serialize(void* buffer) const noexcept = 0;
  virtual void destroy() noexcept = 0;
  virtual IPluginV2* clone() const noexcept = 0;
  virtual void setPluginNamespace(AsciiChar const* name) noexcept = 0;
  virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginV2() noexcept = default;
};

class IPluginV2Ext : public IPluginV2 {
 public:
  virtual DataType getOutputDataType(int32_t output, DataType const* inputs, int32_t input_count) const noexcept = 0;
  virtual bool isOutputBroadcastAcrossBatch(int32_t output, bool const* inputs, int32_t input_count) const noexcept = 0;
  virtual bool canBroadcastInputAcrossBatch(int32_t input) const noexcept = 0;
  virtual void configurePlugin(Dims const* inputs, int32_t input_count, Dims const* outputs, int32_t output_count,
                               DataType const* input_types, DataType const* output_types, bool const* input_broadcast,
                               bool const* output_broadcast, PluginFormat format, int32_t max_batch) noexcept = 0;
  ~IPluginV2Ext() override = default;
  virtual void attachToContext(cudnnContext*, cublasContext*, IGpuAllocator*) noexcept {}
  virtual void detachFromContext() noexcept {}
  IPluginV2Ext* clone() const noexcept override = 0;

 protected:
  void configureWithFormat(Dims const*, int32_t, Dims const*, int32_t, DataType, PluginFormat,
                           int32_t) noexcept override {}
};

class IPluginV2DynamicExt : public IPluginV2Ext {
 public:
  IPluginV2DynamicExt* clone() const noexcept override = 0;
  virtual DimsExprs getOutputDimensions(int32_t output, DimsExprs const* inputs, int32_t input_count,
                                        IExprBuilder& builder) noexcept = 0;
  virtual bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors, int32_t input_count,
                                         int32_t output_count) noexcept = 0;
  virtual void configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                               DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept = 0;
  virtual size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const* outputs,
                                  int32_t output_count) const noexcept = 0;
  virtual int32_t enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const* output_descs,
                          void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept = 0;

 protected:
  ~IPluginV2DynamicExt() noexcept override = default;
  int32_t getTensorRTVersion() const noexcept override { return kDynamicExtKind << 24 | kTensorRtVersion; }

 private:
  // Functions of the older interfaces, which TensorRT does not call for a plug-in with dynamic shapes.
  void configurePlugin(Dims const*, int32_t, Dims const*, int32_t, DataType const*, DataType const*, bool const*,
                       bool const*, PluginFormat, int32_t) noexcept final {}
  bool supportsFormat(DataType, PluginFormat) const noexcept final { return false; }
  Dims getOutputDimensions(int32_t, Dims const*, int32_t) noexcept final { return Dims{-1, {}}; }
  bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept final { return false; }
  bool canBroadcastInputAcrossBatch(int32_t) const noexcept final { return true; }
  size_t getWorkspaceSize(int32_t) const noexcept final { return 0; }
  int32_t enqueue(int32_t, void const* const*, void* const*, void*, cudaStream_t) noexcept final { return 1; }
};

class IPluginCreator {
 public:
  virtual int32_t getTensorRTVersion() const noexcept { return kTensorRtVersion; }
  virtual AsciiChar const* getPluginName() const noexcept = 0;
  virtual AsciiChar const* getPluginVersion() const noexcept = 0;
  virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
  virtual IPluginV2* createPlugin(AsciiChar const* layer, PluginFieldCollection const* fields) noexcept = 0;
  virtual IPluginV2* deserializePlugin(AsciiChar const* layer, void const* data, size_t size) noexcept = 0;
  virtual void setPluginNamespace(AsciiChar const* name) noexcept = 0;
  virtual AsciiChar const* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginCreator() = default;
};

}  // namespace nvinfer1
