#include "tensor_roles.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "attributes.h"

namespace qwen_plugins {
namespace {

using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::IDimensionExpr;

Extents extents(Dims const& dims) {
  Extents result;
  result.rank = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i) {
    result.d[i] = dims.d[i];
  }
  return result;
}

Extents extents(DimsExprs const& dims) {
  Extents result;
  result.rank = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS; ++i) {
    IDimensionExpr const* dim = dims.d[i];
    bool const known = dim != nullptr && dim->isConstant();
    result.d[i] = known ? static_cast<int64_t>(dim->getConstantValue()) : Extents::kUnknown;
  }
  return result;
}

constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

// TensorRT 8.6 has dimensions of 32 bits.
IDimensionExpr const* constant(int64_t value, nvinfer1::IExprBuilder& builder) {
  using Size = std::remove_reference_t<decltype(Dims{}.d[0])>;
  if (value > std::numeric_limits<Size>::max()) {
    throw std::invalid_argument("a dimension of " + std::to_string(value) + " is more than this TensorRT takes");
  }
  return builder.constant(static_cast<Size>(value));
}

bool may_be_equal(int64_t a, int64_t b) { return a == b || a == Extents::kUnknown || b == Extents::kUnknown; }

bool is_leading(char const* name) { return std::strcmp(name, "...") == 0; }

bool is_leading(Dimension const& dimension) { return dimension.name != nullptr && is_leading(dimension.name); }

std::string joined(std::vector<std::string> const& dims) {
  std::string text = "[";
  for (std::string const& dim : dims) {
    text += (text.size() == 1 ? "" : ", ") + dim;
  }
  return text + "]";
}

std::string to_string(int64_t extent) { return extent == Extents::kUnknown ? "?" : std::to_string(extent); }

std::string to_string(Extents const& shape) {
  std::vector<std::string> dims;
  for (int32_t i = 0; i < shape.rank && i < Dims::MAX_DIMS; ++i) {
    dims.push_back(to_string(shape.d[i]));
  }
  return joined(dims);
}

std::string to_string(Pattern const& pattern) {
  std::vector<std::string> dims;
  for (Dimension const& dimension : pattern) {
    if (dimension.name == nullptr) {
      dims.push_back(std::to_string(dimension.number));
    } else {
      dims.push_back((dimension.times == 1 ? "" : std::to_string(dimension.times) + " * ") + dimension.name +
                     (dimension.plus == 0 ? "" : " + " + std::to_string(dimension.plus)));
    }
  }
  return joined(dims);
}

int32_t find(std::vector<TensorRole> const& roles, char const* name) {
  auto const has_name = [name](TensorRole const& role) { return std::strcmp(role.name, name) == 0; };
  auto const found = std::find_if(roles.begin(), roles.end(), has_name);
  return found == roles.end() ? -1 : static_cast<int32_t>(found - roles.begin());
}

// Returns the number that the dimension's name stands for, as an expression of the dimension's extent.
IDimensionExpr const* solved(Dimension const& dimension, int64_t size, IDimensionExpr const* extent,
                             nvinfer1::IExprBuilder& builder) {
  if (dimension.times == 1 && dimension.plus == 0) {
    return extent;
  }
  if (size != Extents::kUnknown) {
    return constant(size, builder);
  }
  using nvinfer1::DimensionOperation;
  IDimensionExpr const* product =
      builder.operation(DimensionOperation::kSUB, *extent, *constant(dimension.plus, builder));
  return builder.operation(DimensionOperation::kFLOOR_DIV, *product, *constant(dimension.times, builder));
}

}  // namespace

int64_t Sizes::operator[](char const* name) const {
  Named const* named = find(name);
  if (named == nullptr) {
    throw std::logic_error(std::string("no tensor has a dimension '") + name + "'");
  }
  return named->size;
}

int64_t Sizes::leading() const {
  int64_t const* const end = leading_.d.data() + leading_.rank;
  if (std::find(leading_.d.data(), end, Extents::kUnknown) != end) {
    return Extents::kUnknown;
  }
  if (std::find(leading_.d.data(), end, 0) != end) {
    return 0;
  }
  int64_t product = 1;
  for (int32_t i = 0; i < leading_.rank; ++i) {
    if (__builtin_mul_overflow(product, leading_.d[i], &product)) {
      return kMaxInt64;
    }
  }
  return product;
}

Sizes::Named const* Sizes::find(char const* name) const {
  for (int32_t i = 0; i < named_count_; ++i) {
    if (std::strcmp(named_[i].dimension->name, name) == 0) {
      return &named_[i];
    }
  }
  return nullptr;
}

// Returns whether the tensor fits the role and the tensors before it; gives names that occur first here their numbers.
bool Sizes::bind(TensorRole const& role, Extents const& tensor, int32_t input) {
  if (tensor.rank < 0 || tensor.rank > Dims::MAX_DIMS) {
    return false;
  }
  if (role.or_scalar && tensor.rank == 0) {
    return true;
  }
  auto const pattern_rank = static_cast<int32_t>(role.shape.size());
  bool const leads = pattern_rank > 0 && is_leading(role.shape[0]);
  int32_t const leading_rank = leads ? tensor.rank - (pattern_rank - 1) : 0;
  if (leads ? !bind_leading(tensor, leading_rank) : tensor.rank != pattern_rank) {
    return false;
  }
  for (int32_t axis = leading_rank; axis < tensor.rank; ++axis) {
    if (!bind(role.shape[axis - leading_rank + (leads ? 1 : 0)], tensor.d[axis], input, axis)) {
      return false;
    }
  }
  return true;
}

bool Sizes::bind_leading(Extents const& tensor, int32_t rank) {
  if (!has_leading_ && rank >= 0) {
    has_leading_ = true;
    leading_ = tensor;
    leading_.rank = rank;
  }
  if (rank != leading_.rank) {
    return false;
  }
  for (int32_t i = 0; i < rank; ++i) {
    if (!may_be_equal(tensor.d[i], leading_.d[i])) {
      return false;
    }
  }
  return true;
}

bool Sizes::bind(Dimension const& dimension, int64_t extent, int32_t input, int32_t axis) {
  if (dimension.name == nullptr) {
    return may_be_equal(dimension.number, extent);
  }
  bool const known = extent != Extents::kUnknown;
  if (known && (extent < dimension.plus || (extent - dimension.plus) % dimension.times != 0)) {
    return false;
  }
  int64_t const size = known ? (extent - dimension.plus) / dimension.times : Extents::kUnknown;
  Named const* const before = find(dimension.name);
  if (before == nullptr) {
    named_.at(named_count_++) = {&dimension, input, axis, size};
    return true;
  }
  return may_be_equal(before->size, size);
}

void Sizes::take_larger(Sizes const& other) {
  if (!has_leading_ && other.has_leading_) {
    has_leading_ = true;
    leading_ = other.leading_;
  }
  for (int32_t i = 0; i < other.named_count_; ++i) {
    Named const& more = other.named_[i];
    Named* const end = named_.data() + named_count_;
    Named* const before = std::find_if(named_.data(), end, [&more](Named const& named) {
      return std::strcmp(named.dimension->name, more.dimension->name) == 0;
    });
    if (before == end) {
      named_.at(named_count_++) = more;
    } else {
      before->size = std::max(before->size, more.size);
    }
  }
}

std::string Sizes::resolved(Pattern const& pattern) const {
  std::vector<std::string> dims;
  for (Dimension const& dimension : pattern) {
    if (dimension.name == nullptr) {
      dims.push_back(std::to_string(dimension.number));
    } else if (is_leading(dimension)) {
      for (int32_t i = 0; i < leading_.rank; ++i) {
        dims.push_back(to_string(leading_.d[i]));
      }
    } else {
      Named const* const named = find(dimension.name);
      int64_t extent = Extents::kUnknown;
      bool const known = named != nullptr && named->size != Extents::kUnknown &&
                         !__builtin_mul_overflow(dimension.times, named->size, &extent) &&
                         !__builtin_add_overflow(extent, dimension.plus, &extent);
      dims.push_back(known ? std::to_string(extent) : "?");
    }
  }
  return joined(dims);
}

TensorRoles::TensorRoles(std::vector<TensorRole> inputs, std::vector<TensorRole> outputs, std::vector<SizeLimit> limits)
    : inputs_(std::move(inputs)), outputs_(std::move(outputs)), limits_(std::move(limits)) {}

int32_t TensorRoles::find_input(char const* name) const { return find(inputs_, name); }

int32_t TensorRoles::find_output(char const* name) const { return find(outputs_, name); }

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

template <typename Shape>
Sizes TensorRoles::bind(Shape const& shape_of, int32_t input_count) const {
  check_input_count(input_count);
  Sizes sizes;
  for (int32_t i = 0; i < input_count; ++i) {
    bind(i, extents(shape_of(i)), sizes);
  }
  return sizes;
}

void TensorRoles::bind(int32_t input, Extents const& shape, Sizes& sizes) const {
  TensorRole const& role = inputs_[input];
  Sizes const before = sizes;
  if (!sizes.bind(role, shape, input)) {
    std::string const pattern = to_string(role.shape);
    std::string const here = before.resolved(role.shape);
    throw std::invalid_argument(std::string("input '") + role.name + "' has shape " + to_string(shape) + "; expected " +
                                pattern + (role.or_scalar ? " or []" : "") +
                                (input == 0 || here == pattern ? "" : ", here " + here));
  }
  check_limits(input, shape, sizes);
}

void TensorRoles::check_limits(int32_t input, Extents const& shape, Sizes const& sizes) const {
  for (SizeLimit const& limit : limits_) {
    bool const leads = is_leading(limit.name);
    Sizes::Named const* const named = leads ? nullptr : sizes.find(limit.name);
    if (leads ? !sizes.has_leading_ : named == nullptr) {
      continue;
    }
    int64_t const size = leads ? sizes.leading() : named->size;
    if (size == Extents::kUnknown || (size >= limit.least && size <= limit.most)) {
      continue;
    }
    std::string const what = leads ? "the product of its leading dimensions" : limit.name;
    throw std::invalid_argument(std::string("input '") + inputs_[input].name + "' has shape " + to_string(shape) +
                                ", where " + what + " is " + (size == kMaxInt64 ? "at least " : "") +
                                std::to_string(size) + "; expected " + std::to_string(limit.least) + " to " +
                                std::to_string(limit.most));
  }
}

void TensorRoles::check_types(nvinfer1::DataType const* types, int32_t input_count) const {
  check_input_count(input_count);
  for (int32_t i = 0; i < input_count; ++i) {
    if (types[i] != inputs_[i].type) {
      throw std::invalid_argument(std::string("input '") + inputs_[i].name + "' has type " + type_name(types[i]) +
                                  "; expected " + type_name(inputs_[i].type));
    }
  }
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
  Sizes const sizes = this->sizes(inputs, input_count);
  DimsExprs shape{};
  for (Dimension const& dimension : outputs_[output].shape) {
    if (dimension.name == nullptr) {
      shape.d[shape.nbDims++] = constant(dimension.number, builder);
    } else if (is_leading(dimension)) {
      for (int32_t i = 0; i < sizes.leading_.rank; ++i) {
        shape.d[shape.nbDims++] = inputs[0].d[i];
      }
    } else {
      Sizes::Named const* const named = sizes.find(dimension.name);
      Dimension const& of_input = *named->dimension;
      IDimensionExpr const* const extent = inputs[named->input].d[named->axis];
      bool const is_same = dimension.times == of_input.times && dimension.plus == of_input.plus;
      // Outputs have dimensions as the input that names them, or the number alone.
      shape.d[shape.nbDims++] = is_same ? extent : solved(of_input, named->size, extent, builder);
    }
  }
  return shape;
}

Sizes TensorRoles::sizes(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count) const {
  return bind([inputs](int32_t i) -> Dims const& { return inputs[i].dims; }, input_count);
}

Sizes TensorRoles::sizes(DimsExprs const* inputs, int32_t input_count) const {
  return bind([inputs](int32_t i) -> DimsExprs const& { return inputs[i]; }, input_count);
}

Sizes TensorRoles::largest_sizes(nvinfer1::PluginTensorDesc const* inputs) const {
  Sizes largest;
  for (int32_t i = 0; i < input_count(); ++i) {
    Sizes alone;
    bind(i, extents(inputs[i].dims), alone);
    largest.take_larger(alone);
  }
  return largest;
}

bool TensorRoles::supports(int32_t position, nvinfer1::PluginTensorDesc const& desc) const {
  if (position < 0 || position >= input_count() + output_count()) {
    return false;
  }
  TensorRole const& role = position < input_count() ? inputs_[position] : outputs_[position - input_count()];
  return desc.type == role.type && desc.format == nvinfer1::TensorFormat::kLINEAR;
}

}  // namespace qwen_plugins
