// TensorRT's side of the plug-in interfaces for a test: a log, shape expressions, fields, tensor descriptions.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "plugins/tensorrt_api.h"

// Ends the test at the first expectation that fails.
#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

using Extent = std::remove_reference_t<decltype(nvinfer1::Dims{}.d[0])>;

class Log : public nvinfer1::ILogger {
 public:
  void log(Severity severity, char const* message) noexcept override {
    CHECK(severity == Severity::kERROR || severity == Severity::kWARNING);
    (severity == Severity::kERROR ? errors_ : warnings_).emplace_back(message);
  }

  // Whether exactly one error was logged since the last call, with this text in it.
  bool got_one_error_with(std::string const& text) {
    bool const matched = errors_.size() == 1 && errors_[0].find(text) != std::string::npos;
    if (!matched) {
      std::fprintf(stderr, "expected one error with '%s', got %zu:\n", text.c_str(), errors_.size());
      for (std::string const& error : errors_) {
        std::fprintf(stderr, "  %s\n", error.c_str());
      }
    }
    errors_.clear();
    return matched;
  }

  // Likewise of warnings.
  bool got_one_warning_with(std::string const& text) {
    bool const matched = warnings_.size() == 1 && warnings_[0].find(text) != std::string::npos;
    warnings_.clear();
    return matched;
  }

  bool is_empty() const { return errors_.empty() && warnings_.empty(); }

 private:
  std::vector<std::string> errors_;
  std::vector<std::string> warnings_;
};

class LogFinder : public nvinfer1::ILoggerFinder {
 public:
  explicit LogFinder(Log& log) : log_(log) {}
  nvinfer1::ILogger* findLogger() override { return &log_; }

 private:
  Log& log_;
};

// A dimension: a number, or unknown until the engine runs (-1).
class Dimension : public nvinfer1::IDimensionExpr {
 public:
  explicit Dimension(Extent value) : implementation_(value) { mImpl = &implementation_; }

 private:
  struct Implementation : nvinfer1::apiv::VDimensionExpr {
    explicit Implementation(Extent given) : value(given) {}
    bool isConstant() const override { return value >= 0; }
    Extent getConstantValue() const override { return value; }
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
    bool isSizeTensor() const override { return false; }
#endif
    Extent value;
  };

  Implementation implementation_;
};

class ShapeExpressions : public nvinfer1::IExprBuilder {
 public:
  ShapeExpressions() : implementation_(*this) { mImpl = &implementation_; }

  nvinfer1::DimsExprs shape(std::initializer_list<Extent> extents) {
    nvinfer1::DimsExprs dims{};
    for (Extent const extent : extents) {
      dims.d[dims.nbDims++] = make(extent);
    }
    return dims;
  }

  nvinfer1::IDimensionExpr const* make(Extent value) { return &dimensions_.emplace_back(value); }

 private:
  struct Implementation : nvinfer1::apiv::VExprBuilder {
    explicit Implementation(ShapeExpressions& given) : owner(given) {}
    nvinfer1::IDimensionExpr const* constant(Extent value) override { return owner.make(value); }
    nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
                                              nvinfer1::IDimensionExpr const&) override {
      return owner.make(-1);
    }
#if QWEN_PLUGINS_TENSORRT_MAJOR >= 10
    nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                      nvinfer1::IDimensionExpr const&) override {
      return nullptr;
    }
#endif
    ShapeExpressions& owner;
  };

  Implementation implementation_;
  std::deque<Dimension> dimensions_;
};

// Fields as a caller passes them. Copies share the values, so that the fields' pointers hold.
class Fields {
 public:
  Fields& add(char const* name, float value) { return add_value(name, value, nvinfer1::PluginFieldType::kFLOAT32); }
  Fields& add(char const* name, int32_t value) { return add_value(name, value, nvinfer1::PluginFieldType::kINT32); }
  Fields& add(char const* name, void const* data, nvinfer1::PluginFieldType type, int32_t length = 1) {
    fields_.emplace_back(name, data, type, length);
    return *this;
  }

  Fields& add_array(char const* name, std::vector<int32_t> const& values) {
    auto kept = std::make_shared<std::vector<int32_t>>(values);
    add(name, kept->data(), nvinfer1::PluginFieldType::kINT32, static_cast<int32_t>(values.size()));
    values_.push_back(std::move(kept));
    return *this;
  }

  nvinfer1::PluginFieldCollection const* collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  template <typename Value>
  Fields& add_value(char const* name, Value value, nvinfer1::PluginFieldType type) {
    values_.push_back(std::make_shared<Value>(value));
    return add(name, values_.back().get(), type);
  }

  std::vector<std::shared_ptr<void>> values_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

inline nvinfer1::PluginTensorDesc tensor(nvinfer1::DataType type, std::initializer_list<Extent> extents,
                                         nvinfer1::TensorFormat format = nvinfer1::TensorFormat::kLINEAR) {
  nvinfer1::PluginTensorDesc desc{};
  desc.type = type;
  desc.format = format;
  for (Extent const extent : extents) {
    desc.dims.d[desc.dims.nbDims++] = extent;
  }
  return desc;
}

inline void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }
