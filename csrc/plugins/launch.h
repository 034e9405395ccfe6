// From a plug-in's attributes and tensors to a kernel launch: what both RMSNorm plug-ins share.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels/rms_norm.h"
#include "plugins/nvtx_range.h"
#include "plugins/tensor_roles.h"

namespace qwen_plugins {

// TensorRT's linear tensors have contiguous rows.
inline void set_rows(RowsOfX const& rows, RmsNormParams& params) {
  RowStrides const contiguous{rows.count * rows.hidden_size, rows.hidden_size};
  params.rows = {rows.count, rows.count};
  params.hidden_size = rows.hidden_size;
  params.x_strides = contiguous;
  params.residual_strides = contiguous;
  params.residual_out_strides = contiguous;
}

template <typename Attributes>
void set_attributes(Attributes const& attributes, RmsNormParams& params) {
  params.eps = attributes.eps;
  params.dtype = static_cast<DataType>(attributes.type_id);
  params.weight_dtype = static_cast<DataType>(attributes.weight_type_id);
  params.unit_offset = attributes.unit_offset != 0;
}

// Launches inside an NVTX range of that name, nothing where there are no elements; throws if the launch fails.
template <typename RangeName, typename Params>
void launch_in_range(Params const& params, cudaError_t (*launch)(Params const&, cudaStream_t), cudaStream_t stream) {
  NvtxRange<RangeName> const range;
  if (params.rows.total == 0 || params.hidden_size == 0) {
    return;
  }
  cudaError_t const status = launch(params, stream);
  if (status != cudaSuccess) {
    throw std::runtime_error("launch of " + std::to_string(params.rows.total) + " rows of " +
                             std::to_string(params.hidden_size) + " failed: " + cudaGetErrorString(status));
  }
}

}  // namespace qwen_plugins
