// What each input and output of a plug-in is. Both plug-ins work row by row over the last dimension of x, so the role
// of a tensor settles its type, its shape and what TensorRT is told about either.
#pragma once

#include <cstdint>
#include <vector>

#include "tensorrt_api.h"

namespace qwen_plugins {

enum class TensorShape {
  kRows,       // the shape of x: [..., hidden_size]
  kPerRow,     // [..., 1]
  kChannels,   // [hidden_size]
  kPerTensor,  // one value: [] or [1]
};

struct TensorRole {
  char const* name;
  nvinfer1::DataType type;
  TensorShape shape;
};

// Rows of x, and how long they are.
struct RowsOfX {
  int64_t count;
  int64_t hidden_size;
};

// The inputs, first of all x, and the outputs, in the order in which TensorRT passes them.
class TensorRoles {
 public:
  TensorRoles(std::vector<TensorRole> inputs, std::vector<TensorRole> outputs);

  int32_t input_count() const { return static_cast<int32_t>(inputs_.size()); }
  int32_t output_count() const { return static_cast<int32_t>(outputs_.size()); }

  // These throw std::invalid_argument where TensorRT asks for what does not exist or brings shapes that do not fit.
  nvinfer1::DataType output_type(int32_t output) const;
  nvinfer1::DimsExprs output_shape(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t input_count,
                                   nvinfer1::IExprBuilder& builder) const;
  // Whether the tensor at `position` (inputs, then outputs) has its one type in linear layout: with a single choice
  // TensorRT has nothing to time, and puts no reformatting between two plug-ins.
  bool supports(int32_t position, nvinfer1::PluginTensorDesc const& desc) const;
  // Dimensions that are not known yet are -1 and fit anything.
  void check_inputs(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count) const;

  static RowsOfX rows_of(nvinfer1::PluginTensorDesc const& x);

 private:
  void check_input_count(int32_t count) const;

  std::vector<TensorRole> inputs_;
  std::vector<TensorRole> outputs_;
};

}  // namespace qwen_plugins
