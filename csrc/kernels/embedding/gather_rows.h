// Gathering rows, y[i] = table[ids[i]], for the embedding and the last token of each sequence: what the host can
// launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

struct GatherRowsParams {
  const void* table = nullptr;   // [table_rows, row_size], contiguous
  const int32_t* ids = nullptr;  // [rows], on the device; an id outside of the table gives a row of zeros
  void* y = nullptr;             // [rows, row_size], contiguous
  int64_t table_rows = 0;
  int64_t row_size = 0;                 // elements
  int64_t rows = 0;                     // 0 launches nothing
  DataType dtype = DataType::kFloat16;  // any: what is copied does not matter
};

// Launches on `stream` and returns at once. cudaErrorInvalidValue for parameters outside of what is written above.
QWEN_PLUGINS_API cudaError_t launch_gather_rows(const GatherRowsParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
