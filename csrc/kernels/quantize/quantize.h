// Quantization of rows to 8 bits: what the host can launch.
//
//   q = saturate(round(x / scale)),  scale = max|row of x| / 127 (int8) or / 448 (float8), or one for all rows
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

struct QuantizeParams {
  const void* x = nullptr;                 // [rows, columns], dtype
  int64_t x_row_stride = 0;                // elements, not below 0
  void* q = nullptr;                       // [rows, columns], contiguous, quant_dtype
  int64_t rows = 0;                        // at most 2^31 - 1; 0 launches nothing
  int64_t columns = 0;                     // from 1 to 2^31 - 1
  DataType dtype = DataType::kFloat16;     // kFloat32, kFloat16 or kBFloat16
  DataType quant_dtype = DataType::kInt8;  // kInt8 or kFloat8E4M3
  const float* static_scale = nullptr;     // one float32 on the device, above 0; null: dynamic, per row
  // [rows], written where static_scale is null: the smallest normal float32 for a row of zeros, NaN for a row with NaN
  // or infinity.
  float* scales = nullptr;
};

// Launches on `stream` and returns at once: no synchronisation, no allocation. Quotients are those of float32, rounded
// to nearest even. cudaErrorInvalidValue for parameters outside of what is written above, otherwise what the launch
// returned.
QWEN_PLUGINS_API cudaError_t launch_quantize(const QuantizeParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
