#include "tensor_roles.h"

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

namespace qwen_plugins {
namespace {

using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;

constexpr int64_t kUnknown = -1;

// Dimensions of one tensor as numbers, whether they came from an expression or from a description.
struct Extents {
  int32_t rank;
  std::array<int64_t, Dims::MAX_DIMS> d;
};

Extents extents(Dims const& dims) {
  Extents result{dims.nbDims, {}};
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    result.d[i] = dims.d[i];
  }
  return result;
}

Extents extents(DimsExprs const& dims) {
  Extents result{dims.nbDims, {}};
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    IDimensionExpr const* dim = dims.d[i];
    result.d[i] = dim != nullptr && dim->isConstant() ? static_cast<int64_t>(dim->getConstantValue()) : kUnknown;
  }
  return result;
}

std::string to_string(Extents const& shape) {
  std::string text = "[";
  for (int32_t i = 0; i < shape.rank; ++i) {
    text += (i == 0 ? "" : ", ") + (shape.d[i] == kUnknown ? std::string("?") : std::to_string(shape.d[i]));
  }
  return text + "]";
}

bool may_be_equal(int64_t a, int64_t b) { return a == b || a == kUnknown || b == kUnknown; }

bool fits(Extents const& tensor, TensorShape shape, Extents const& x) {
  switch (shape) {
    case TensorShape::kChannels:
      return tensor.rank == 1 && may_be_equal(tensor.d[0], x.d[x.rank - 1]);
    case TensorShape::kPerTensor:
      return tensor.rank == 0 || (tensor.rank == 1 && may_be_equal(tensor.d[0], 1));
    case TensorShape::kRows:
    case TensorShape::kPerRow:
      break;
  }
  if (tensor.rank != x.rank) {
    return false;
  }
  for (int32_t i = 0; i < x.rank; ++i) {
    bool const replaced = shape == TensorShape::kPerRow && i == x.rank - 1;
    if (!may_be_equal(tensor.d[i], replaced ? 1 : x.d[i])) {
      return false;
    }
  }
  return true;
}

char const* description(TensorShape shape) {
  switch (shape) {
    case TensorShape::kRows:
      return "the shape of x";
    case TensorShape::kPerRow:
      return "the shape of x with 1 as last dimension";
    case TensorShape::kChannels:
      return "[last dimension of x]";
    case TensorShape::kPerTensor:
      return "[] or [1]";
  }
  return "";
}

void check_input(TensorRole const& role, Extents const& tensor, Extents const& x) {
  if (tensor.rank < 0 || tensor.rank > Dims::MAX_DIMS || !fits(tensor, role.shape, x)) {
    throw std::invalid_argument(std::string("input '") + role.name + "' has shape " + to_string(tensor) +
                                "; expected " + description(role.shape) + ", and x has shape " + to_string(x));
  }
}

void check_x(Extents const& x) {
  if (x.rank < 1 || x.rank > Dims::MAX_DIMS) {
    throw std::invalid_argument("input 'x' has " + std::to_string(x.rank) + " dimensions; expected 1 to " +
                                std::to_string(Dims::MAX_DIMS));
  }
}

}  // namespace

TensorRoles::TensorRoles(std::vector<TensorRole> inputs, std::vector<TensorRole> outputs)
    : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {}

void TensorRoles::check_input_count(int32_t count) const {
  if (count == input_count()) {
    return;
  }
  std::string names;
  for (TensorRole const& role : inputs_) {
    names += (names.empty() ? "" : ", ") + std::string(role.name);
  }
  throw std::invalid_argument("got " + std::to_string(count) + " inputs; expected " + std::to_string(input_count()) +
                              " with these fields: " + names);
}

nvinfer1::DataType TensorRoles::output_type(int32_t output) const {
  if (output < 0 || output >= output_count()) {
    throw std::invalid_argument("there is no output " + std::to_string(output) + "; there are " +
                                std::to_string(output_count()));
  }
  return outputs_[output].type;
}

DimsExprs TensorRoles::output_shape(int32_t output, DimsExprs const* inputs, int32_t input_count,
                                    nvinfer1::IExprBuilder& builder) const {
  output_type(output);  // checks the index
  check_input_count(input_count);
  Extents const x = extents(inputs[0]);
  check_x(x);
  for (int32_t i = 1; i < input_count; ++i) {
    check_input(inputs_[i], extents(inputs[i]), x);
  }
  DimsExprs shape = inputs[0];
  if (outputs_[output].shape == TensorShape::kPerRow) {
    shape.d[shape.nbDims - 1] = builder.constant(1);
  }
  return shape;
}

bool TensorRoles::supports(int32_t position, nvinfer1::PluginTensorDesc const& desc) const {
  if (position < 0 || position >= input_count() + output_count()) {
    return false;
  }
  TensorRole const& role = position < input_count() ? inputs_[position] : outputs_[position - input_count()];
  return desc.type == role.type && desc.format == nvinfer1::TensorFormat::kLINEAR;
}

void TensorRoles::check_inputs(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count) const {
  check_input_count(input_count);
  Extents const x = extents(inputs[0].dims);
  check_x(x);
  for (int32_t i = 1; i < input_count; ++i) {
    check_input(inputs_[i], extents(inputs[i].dims), x);
  }
}

RowsOfX TensorRoles::rows_of(nvinfer1::PluginTensorDesc const& x) {
  RowsOfX rows{1, x.dims.d[x.dims.nbDims - 1]};
  for (int32_t i = 0; i < x.dims.nbDims - 1; ++i) {
    rows.count *= x.dims.d[i];
  }
  return rows;
}

}  // namespace qwen_plugins
