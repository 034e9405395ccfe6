// What both RMSNorm plug-ins share: checks of attributes, parameters and the launch.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/rms_norm/rms_norm.h"
#include "plugins/plugin_base.h"

namespace qwen_plugins {

// The product of both is below 2^63. Where an output has a number for each row, rows must have elements to compute it
// of.
inline std::vector<SizeLimit> rms_norm_limits(int64_t least_hidden_size) {
  return {{"...", 0, std::numeric_limits<uint32_t>::max()}, {"hidden_size", least_hidden_size, kMaxInt32}};
}

// Resolves defaults, and throws std::invalid_argument for values that are out of range.
template <typename Attributes>
void check_rms_norm_attributes(Attributes& attributes) {
  require_positive("eps", attributes.eps);
  require_type("type_id", attributes.type_id, floating_types());
  if (attributes.weight_type_id == -1) {
    attributes.weight_type_id = attributes.type_id;
  }
  require_type("weight_type_id", attributes.weight_type_id,
               {nvinfer1::DataType::kFLOAT, static_cast<nvinfer1::DataType>(attributes.type_id)});
  require_flag("residual", attributes.residual);
  require_flag("unit_offset", attributes.unit_offset);
}

// Sets everything but the addresses. Tensors of TensorRT's linear format are contiguous.
template <typename Attributes>
void set_rms_norm_params(Attributes const& attributes, int64_t count, int64_t hidden_size, RmsNormParams& params) {
  params.rows = {count, count};
  params.hidden_size = hidden_size;
  RowStrides const contiguous{count * params.hidden_size, params.hidden_size};
  params.x_strides = contiguous;
  params.residual_strides = contiguous;
  params.residual_out_strides = contiguous;
  params.eps = attributes.eps;
  params.dtype = static_cast<DataType>(attributes.type_id);
  params.weight_dtype = static_cast<DataType>(attributes.weight_type_id);
  params.unit_offset = attributes.unit_offset != 0;
}

// Launches unless there are no elements; throws if the launch fails.
template <typename Params>
void launch_rows(Params const& params, cudaError_t (*launch)(Params const&, cudaStream_t), cudaStream_t stream) {
  if (params.rows.total == 0 || params.hidden_size == 0) {
    return;
  }
  check_cuda(launch(params, stream), [&] {
    return "launch of " + std::to_string(params.rows.total) + " rows of " + std::to_string(params.hidden_size);
  });
}

}  // namespace qwen_plugins
