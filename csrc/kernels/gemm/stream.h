// The GEMM for few rows, which streams the weight: what gemm.cu launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm.h"

namespace qwen_plugins {

// Rows of x that one launch can compute.
constexpr int64_t kMaxStreamedRows = 16;

// By the type of the operands; x, weight and the rows of both begin at multiples of 16 bytes.
cudaError_t launch_gemm_stream_float16(const GemmParams& params, cudaStream_t stream);
cudaError_t launch_gemm_stream_bfloat16(const GemmParams& params, cudaStream_t stream);

// Parameters of the kernel. A tile is 8 weight rows: two halves of 4, whose columns of y are the same with SwiGLU (gate
// and up) and neighbours without.
struct StreamArguments {
  const void* weight;
  const void* x;
  const void* bias;
  void* y;
  int64_t x_row_stride;  // elements
  int64_t half_stride;   // elements of weight from the first half of a tile to the second
  int64_t tile_stride;   // elements of weight from a tile to the next
  int32_t half_bias;     // elements of bias from a column of y to the bias of its second half
  int32_t half_columns;  // columns of y from the first half of a tile to the second
  int32_t tile_columns;  // columns of y of a tile
  int32_t columns;       // of y
  int32_t rows;          // of x
  int32_t in_features;
  int32_t chunks;          // of k
  int32_t chunks_of_warp;  // at most
  int32_t group_columns;   // columns of y that a block computes at a time: those of all its tiles, or fewer
  int32_t groups;
  bool swiglu;
  bool constant_weight;
};

}  // namespace qwen_plugins
