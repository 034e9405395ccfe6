// The GEMM for few rows, which streams the weight.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm_kernel.h"

namespace qwen_plugins {

// Rows of x that one launch can compute.
constexpr int64_t kMaxStreamedRows = 16;

// The kernel, and the same kMaxStreamedRows rows at a time.
GemmKernel stream_kernel();
GemmKernel stream_in_parts_kernel();

// Whether the rules keep a shape for gemm_stream, and so grant no workspace to others.
bool is_for_stream(const GemmShape& shape);

// Where the rows of x are while they are multiplied; the numbers are those of the kernel's variants.
enum class StreamVariant : int32_t {
  kKeepsX = 1,    // all in shared memory
  kStreamsX = 2,  // they go through the ring buffer with the weights: for x that is too large
  kSmall = 3,     // likewise, with less shared memory than most devices have
};

// By the type of the operands; x, weight and the rows of both begin at multiples of 16 bytes.
cudaError_t launch_gemm_stream_float16(const GemmParams& params, StreamVariant variant, const DeviceProperties& device,
                                       cudaStream_t stream);
cudaError_t launch_gemm_stream_bfloat16(const GemmParams& params, StreamVariant variant, const DeviceProperties& device,
                                        cudaStream_t stream);

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
