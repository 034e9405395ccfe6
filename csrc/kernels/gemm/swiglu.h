// SwiGLU without its GEMMs: what the host can launch.
//
//   y = silu(gate) * up,  silu(g) = g / (1 + exp(-g)),  computed in float32
//
// Shazeer, "GLU Variants Improve Transformer" (2020).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

struct SwigluParams {
  const void* gate_up = nullptr;        // [rows, 2 * size], dtype: gate, then up
  void* y = nullptr;                    // [rows, size], dtype
  int64_t gate_up_row_stride = 0;       // elements
  int64_t y_row_stride = 0;             // elements; 0: size
  int64_t rows = 0;                     // 0 launches nothing
  int64_t size = 0;                     // intermediate_size
  DataType dtype = DataType::kFloat16;  // kFloat32, kFloat16 or kBFloat16
};

// Launches on `stream` and returns at once: no synchronisation, no allocation. cudaErrorInvalidValue for parameters
// outside of what is written above, otherwise what the launch returned.
QWEN_PLUGINS_API cudaError_t launch_swiglu(const SwigluParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
