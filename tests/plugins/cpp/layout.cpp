// What plug-ins and TensorRT must agree on. Compiled once with our declarations and once with the official headers;
// test_tensorrt_layout.py compares what this prints and the compiler's listing of the virtual tables below.
#include <cstddef>
#include <cstdio>

#include "plugins/tensorrt_api.h"
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
#include "plugins/plugin_v3_adapter.h"
#else
#include "plugins/dynamic_ext_adapter.h"
#endif
#include "plugins/rms_norm/rms_norm_plugin.h"

#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
template class qwen_plugins::PluginV3Adapter<qwen_plugins::RmsNormPlugin>;
template class qwen_plugins::PluginV3Creator<qwen_plugins::RmsNormPlugin>;
#else
template class qwen_plugins::DynamicExtAdapter<qwen_plugins::RmsNormPlugin>;
template class qwen_plugins::DynamicExtCreator<qwen_plugins::RmsNormPlugin>;
#endif

namespace probe {

using namespace nvinfer1;
using Size = decltype(Dims{}.d[0] + 0);  // int or long: how wide a dimension is

// The interfaces that TensorRT implements and we call.
struct Logger : ILogger {
  void log(Severity, AsciiChar const*) noexcept override {}
};

struct LoggerFinder : ILoggerFinder {
  ILogger* findLogger() override { return nullptr; }
};

struct DimensionExpr : apiv::VDimensionExpr {
  bool isConstant() const override { return true; }
  Size getConstantValue() const override { return 0; }
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  bool isSizeTensor() const override { return false; }
#endif
};

struct ExprBuilder : apiv::VExprBuilder {
  IDimensionExpr const* constant(Size) override { return nullptr; }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
#endif
};

struct Expression : IDimensionExpr {
  size_t implementation_offset() const {
    return reinterpret_cast<char const*>(&mImpl) - reinterpret_cast<char const*>(this);
  }
};

struct Builder : IExprBuilder {
  size_t implementation_offset() const {
    return reinterpret_cast<char const*>(&mImpl) - reinterpret_cast<char const*>(this);
  }
};

}  // namespace probe

#define SIZE(type) std::printf("sizeof " #type " %zu\n", sizeof(nvinfer1::type))
#define OFFSET(type, member) std::printf("offset " #type "::" #member " %zu\n", offsetof(nvinfer1::type, member))
#define VALUE(value) std::printf(#value " %d\n", static_cast<int>(nvinfer1::value))

int main() {
  SIZE(Dims);
  OFFSET(Dims, nbDims);
  OFFSET(Dims, d);
  SIZE(PluginTensorDesc);
  OFFSET(PluginTensorDesc, dims);
  OFFSET(PluginTensorDesc, type);
  OFFSET(PluginTensorDesc, format);
  OFFSET(PluginTensorDesc, scale);
  SIZE(DynamicPluginTensorDesc);
  OFFSET(DynamicPluginTensorDesc, desc);
  OFFSET(DynamicPluginTensorDesc, min);
  OFFSET(DynamicPluginTensorDesc, max);
  SIZE(PluginField);
  OFFSET(PluginField, name);
  OFFSET(PluginField, data);
  OFFSET(PluginField, type);
  OFFSET(PluginField, length);
  SIZE(PluginFieldCollection);
  OFFSET(PluginFieldCollection, nbFields);
  OFFSET(PluginFieldCollection, fields);
  SIZE(DimsExprs);
  OFFSET(DimsExprs, nbDims);
  OFFSET(DimsExprs, d);
  SIZE(IDimensionExpr);
  SIZE(IExprBuilder);
  std::printf("offset IDimensionExpr::mImpl %zu\n", probe::Expression().implementation_offset());
  std::printf("offset IExprBuilder::mImpl %zu\n", probe::Builder().implementation_offset());
  VALUE(DataType::kFLOAT);
  VALUE(DataType::kHALF);
  VALUE(DataType::kINT8);
  VALUE(DataType::kINT32);
  VALUE(DataType::kFP8);
  VALUE(TensorFormat::kLINEAR);
  VALUE(DimensionOperation::kSUB);
  VALUE(DimensionOperation::kFLOOR_DIV);
  VALUE(PluginFieldType::kFLOAT16);
  VALUE(PluginFieldType::kFLOAT32);
  VALUE(PluginFieldType::kINT32);
  VALUE(PluginFieldType::kUNKNOWN);
  VALUE(ILogger::Severity::kERROR);
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  OFFSET(DynamicPluginTensorDesc, opt);
  VALUE(DataType::kBF16);
  VALUE(TensorRTPhase::kBUILD);
  VALUE(TensorRTPhase::kRUNTIME);
  VALUE(PluginCapabilityType::kCORE);
  VALUE(PluginCapabilityType::kBUILD);
  VALUE(PluginCapabilityType::kRUNTIME);
  SIZE(InterfaceInfo);
#endif
  probe::Logger logger;
  probe::LoggerFinder finder;
  probe::DimensionExpr expression;
  probe::ExprBuilder builder;
  static_cast<void>(logger), static_cast<void>(finder), static_cast<void>(expression), static_cast<void>(builder);
  return 0;
}
