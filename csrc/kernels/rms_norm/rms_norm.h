// RMSNorm and RMSNorm followed by quantization: what the host can launch.
//
//   h = x + residual                      (only with a residual; rounded to the type of x)
//   y = h / sqrt(mean(h^2) + eps) * w     (w = weight, or weight + 1 with unit_offset)
//   q = saturate(round(y / smoothing / scale))
//
// Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); SmoothQuant: Xiao et al. (2022).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

// Where the rows of one operand lie, in elements: row r starts at
// (r / RowCount::inner) * outer + (r % RowCount::inner) * inner from the base. A plain matrix has RowCount::inner ==
// RowCount::total and its row stride as inner.
struct RowStrides {
  int64_t outer;
  int64_t inner;
};

struct RowCount {
  int64_t total;  // rows in all; 0 launches nothing
  int64_t inner;  // rows in the inner of the two leading dimensions; divides total
};

struct RmsNormParams {
  const void* x = nullptr;         // [rows, hidden_size], dtype
  const void* residual = nullptr;  // [rows, hidden_size], dtype; null: none
  const void* weight = nullptr;    // [hidden_size], weight_dtype
  void* residual_out = nullptr;    // [rows, hidden_size], dtype: x + residual; needed with a residual
  RowStrides x_strides{};
  RowStrides residual_strides{};
  RowStrides residual_out_strides{};
  RowCount rows{};
  int64_t hidden_size = 0;
  DataType dtype = DataType::kFloat16;         // kFloat32, kFloat16 or kBFloat16
  DataType weight_dtype = DataType::kFloat16;  // dtype or kFloat32
  float eps = 1e-6F;
  bool unit_offset = false;
  // A row's result has the same bits whatever the number of rows. Otherwise that decides how its sum is divided.
  bool batch_invariant = false;

  // Outputs of launch_rms_norm.
  void* y = nullptr;  // [rows, hidden_size], dtype; may be x itself (same address, same strides)
  RowStrides y_strides{};
  // Round h / sqrt(...) to dtype before multiplying by the weight, as Hugging Face's modules do.
  bool round_before_weight = false;
};

struct RmsNormQuantParams : RmsNormParams {
  void* q = nullptr;                              // [rows, hidden_size] contiguous, quant_dtype
  DataType quant_dtype = DataType::kInt8;         // kInt8 or kFloat8E4M3
  const void* smoothing = nullptr;                // [hidden_size], smoothing_dtype; null: none
  DataType smoothing_dtype = DataType::kFloat32;  // dtype or kFloat32
  const float* static_scale = nullptr;            // one float32 on the device; null: dynamic, per row
  float* scales = nullptr;                        // [rows], written when static_scale is null
};

// Both launch on `stream` and return at once: no synchronisation, no allocation. They return cudaErrorInvalidValue for
// parameters outside of what is written above, and otherwise what the launch returned.
QWEN_PLUGINS_API cudaError_t launch_rms_norm(const RmsNormParams& params, cudaStream_t stream);
QWEN_PLUGINS_API cudaError_t launch_rms_norm_quant(const RmsNormQuantParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
