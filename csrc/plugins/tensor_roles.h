// The name, the one type and the shape pattern of each input and output of a plug-in. The patterns determine the shapes
// of outputs, which inputs are refused, and the sizes that a launch needs.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "tensorrt_api.h"

namespace qwen_plugins {

// A dimension of a pattern: a number, or times * name + plus. A name stands for the same number in all tensors of a
// plug-in. The name "...", allowed at the front only, stands for any number of dimensions, the same in all tensors.
struct Dimension {
  Dimension(int64_t given) : number(given) {}
  Dimension(char const* given) : name(given) {}
  Dimension(int64_t given_times, char const* given, int64_t given_plus = 0)
      : name(given), times(given_times), plus(given_plus) {}

  char const* name = nullptr;
  int64_t number = 0;
  int64_t times = 1;
  int64_t plus = 0;
};

using Pattern = std::vector<Dimension>;

struct TensorRole {
  char const* name;
  nvinfer1::DataType type;
  Pattern shape;
  bool or_scalar = false;  // a tensor without dimensions is allowed, too
};

// The dimensions of one tensor as numbers. kUnknown is one that is not known yet; it fits anything.
struct Extents {
  static constexpr int64_t kUnknown = -1;
  int32_t rank = 0;
  std::array<int64_t, nvinfer1::Dims::MAX_DIMS> d{};
};

// The numbers that a launch takes for a name in the patterns; for "..." it is the product of those dimensions.
struct SizeLimit {
  char const* name;
  int64_t least;
  int64_t most;
};

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// The numbers that the names in the patterns stand for, found from the inputs' shapes.
class Sizes {
 public:
  int64_t operator[](char const* name) const;
  // The product of the dimensions "...", kUnknown if one of them is; the largest int64 where it is larger than that.
  int64_t leading() const;

 private:
  friend class TensorRoles;

  struct Named {
    Dimension const* dimension;  // where the name occurs first, in this input and axis
    int32_t input;
    int32_t axis;
    int64_t size;
  };

  Named const* find(char const* name) const;
  bool bind(TensorRole const& role, Extents const& tensor, int32_t input);
  bool bind(Dimension const& dimension, int64_t extent, int32_t input, int32_t axis);
  bool bind_leading(Extents const& tensor, int32_t rank);
  void take_larger(Sizes const& other);
  std::string resolved(Pattern const& pattern) const;

  std::array<Named, 8> named_{};
  int32_t named_count_ = 0;
  bool has_leading_ = false;
  Extents leading_;
};

// The inputs and the outputs in the order in which TensorRT passes them. "..." is taken from the first input.
class TensorRoles {
 public:
  TensorRoles(std::vector<TensorRole> inputs, std::vector<TensorRole> outputs, std::vector<SizeLimit> limits = {});

  int32_t input_count() const { return static_cast<int32_t>(inputs_.size()); }
  int32_t output_count() const { return static_cast<int32_t>(outputs_.size()); }
  // Returns the index of the tensor with that name, or -1.
  int32_t find_input(char const* name) const;
  int32_t find_output(char const* name) const;

  // These throw std::invalid_argument for an output that does not exist, and for shapes that do not fit or are beyond
  // the limits. What is not known yet fits.
  nvinfer1::DataType output_type(int32_t output) const;
  nvinfer1::DimsExprs output_shape(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t input_count,
                                   nvinfer1::IExprBuilder& builder) const;
  Sizes sizes(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count) const;
  Sizes sizes(nvinfer1::PluginTensorDesc const* inputs) const { return sizes(inputs, input_count()); }
  Sizes sizes(nvinfer1::DimsExprs const* inputs, int32_t input_count) const;
  // Returns the largest number of each name over the inputs, for the maxima of an optimization profile. Those need not
  // fit together; the shapes at run time do, and no size is above these.
  Sizes largest_sizes(nvinfer1::PluginTensorDesc const* inputs) const;
  // Throws std::invalid_argument for an input of another type than its one.
  void check_types(nvinfer1::DataType const* types, int32_t input_count) const;
  // Returns whether the tensor at `position` (inputs, then outputs) has its one type in the linear format. With one
  // choice TensorRT has nothing to time, and inserts no reformatting between two plug-ins.
  bool supports(int32_t position, nvinfer1::PluginTensorDesc const& desc) const;

 private:
  template <typename Shape>
  Sizes bind(Shape const& shape_of, int32_t input_count) const;
  void check_input_count(int32_t count) const;
  void bind(int32_t input, Extents const& shape, Sizes& sizes) const;
  void check_limits(int32_t input, Extents const& shape, Sizes const& sizes) const;

  std::vector<TensorRole> inputs_;
  std::vector<TensorRole> outputs_;
  std::vector<SizeLimit> limits_;
};

}  // namespace qwen_plugins
