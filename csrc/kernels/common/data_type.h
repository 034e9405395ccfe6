// The element types that the kernels know, independent of any framework.
#pragma once

#include <cstdint>

namespace qwen_plugins {

// The values are those of TensorRT's nvinfer1::DataType, and part of the plug-ins' serialised form: none may change.
enum class DataType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kInt8 = 2,
  kInt32 = 3,
  kBFloat16 = 7,
  kFloat8E4M3 = 6,
};

constexpr int64_t size_of(DataType type) {
  switch (type) {
    case DataType::kFloat32:
    case DataType::kInt32:
      return 4;
    case DataType::kFloat16:
    case DataType::kBFloat16:
      return 2;
    case DataType::kInt8:
    case DataType::kFloat8E4M3:
      return 1;
  }
  return 0;
}

}  // namespace qwen_plugins
