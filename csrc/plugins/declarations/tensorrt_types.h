// The types that plug-ins exchange with TensorRT, laid out as TensorRT lays them out. See README.md.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#ifndef QWEN_PLUGINS_TENSORRT_MAJOR
#error "Define QWEN_PLUGINS_TENSORRT_MAJOR as 8, 10 or 11"
#endif

struct cublasContext;
struct cudnnContext;

namespace nvinfer1 {

using AsciiChar = char;

enum class DataType : int32_t {
  kFLOAT = 0,
  kHALF = 1,
  kINT8 = 2,
  kINT32 = 3,
  kFP8 = 6,
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  kBF16 = 7,
#endif
};

enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1, kHWC8 = 2 };
using PluginFormat = TensorFormat;

#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
using DimensionSize = int64_t;
#else
using DimensionSize = int32_t;
#endif

struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  DimensionSize d[MAX_DIMS];
};

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min;
  Dims max;
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  Dims opt;
#endif
};

enum class PluginFieldType : int32_t {
  kFLOAT16 = 0,
  kFLOAT32 = 1,
  kFLOAT64 = 2,
  kINT8 = 3,
  kINT16 = 4,
  kINT32 = 5,
  kCHAR = 6,
  kDIMS = 7,
  kUNKNOWN = 8,
};

struct PluginField {
  AsciiChar const* name;
  void const* data;
  PluginFieldType type;
  int32_t length;

  PluginField(AsciiChar const* field_name = nullptr, void const* field_data = nullptr,
              PluginFieldType field_type = PluginFieldType::kUNKNOWN, int32_t field_length = 0) noexcept
      : name(field_name), data(field_data), type(field_type), length(field_length) {}
};

struct PluginFieldCollection {
  int32_t nbFields;
  PluginField const* fields;
};

// Shape expressions: the public classes forward to an implementation object that TensorRT owns.
class IDimensionExpr;
enum class DimensionOperation : int32_t { kSUM = 0, kPROD = 1, kSUB = 4, kFLOOR_DIV = 7 };

namespace apiv {

class VRoot {
 public:
  virtual ~VRoot() noexcept = default;
};

class VDimensionExpr : public VRoot {
 public:
  virtual bool isConstant() const = 0;
  virtual DimensionSize getConstantValue() const = 0;
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  virtual bool isSizeTensor() const = 0;
#endif
};

class VExprBuilder : public VRoot {
 public:
  virtual IDimensionExpr const* constant(DimensionSize value) = 0;
  virtual IDimensionExpr const* operation(DimensionOperation operation, IDimensionExpr const& first,
                                          IDimensionExpr const& second) = 0;
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
  virtual IDimensionExpr const* declareSizeTensor(int32_t output, IDimensionExpr const& opt,
                                                  IDimensionExpr const& upper) = 0;
#endif
};

}  // namespace apiv

class INoCopy {
 protected:
  INoCopy() = default;
  virtual ~INoCopy() = default;
  INoCopy(INoCopy const&) = delete;
  INoCopy& operator=(INoCopy const&) = delete;
};

class IDimensionExpr : public INoCopy {
 public:
  bool isConstant() const noexcept { return mImpl->isConstant(); }
  DimensionSize getConstantValue() const noexcept { return mImpl->getConstantValue(); }

 protected:
  apiv::VDimensionExpr* mImpl;
  ~IDimensionExpr() noexcept override = default;
};

class IExprBuilder : public INoCopy {
 public:
  IDimensionExpr const* constant(DimensionSize value) noexcept { return mImpl->constant(value); }
  IDimensionExpr const* operation(DimensionOperation operation, IDimensionExpr const& first,
                                  IDimensionExpr const& second) noexcept {
    return mImpl->operation(operation, first, second);
  }

 protected:
  apiv::VExprBuilder* mImpl;
  ~IExprBuilder() noexcept override = default;
};

struct DimsExprs {
  int32_t nbDims;
  IDimensionExpr const* d[Dims::MAX_DIMS];
};

#if QWEN_PLUGINS_TENSORRT_MAJOR < 11  // tensorrt_v3.h has those of 11

class ILogger {
 public:
  enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, AsciiChar const* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class ILoggerFinder {
 public:
  virtual ILogger* findLogger() = 0;

 protected:
  virtual ~ILoggerFinder() = default;
};

#endif

}  // namespace nvinfer1
