// The matrix product of a linear layer: what the host can launch.
//
//   z = x · weight^T + bias,  accumulated in float32
//   y = z,  or with kSwiglu  y = silu(z_gate) * z_up,  the first half of z's columns being the gate
//
// With few rows (decoding), on Hopper up to 64, the weight is read by kernels of ours at the memory's speed. Many rows
// with SwiGLU have a kernel of ours on Hopper; others go to cuBLASLt where it can be loaded, else through the kernel
// for few again and again.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/data_type.h"

namespace qwen_plugins {

enum class Activation : int32_t { kNone = 0, kSwiglu = 1 };

// What the choice of a kernel and its workspace depend on.
struct GemmShape {
  int64_t rows = 0;          // of x; 0 launches nothing
  int64_t in_features = 0;   // K
  int64_t out_features = 0;  // N: of z, so twice the columns of y with kSwiglu
  Activation activation = Activation::kNone;
  DataType dtype = DataType::kFloat16;  // kFloat32, kFloat16 or kBFloat16: of x, weight, bias and y
};

// Of y.
constexpr int64_t columns_of(const GemmShape& shape) {
  return shape.activation == Activation::kSwiglu ? shape.out_features / 2 : shape.out_features;
}

struct GemmParams {
  GemmShape shape;
  const void* x = nullptr;       // [rows, in_features]
  const void* weight = nullptr;  // [out_features, in_features], contiguous
  const void* bias = nullptr;    // [out_features]; null: none
  void* y = nullptr;             // [rows, out_features], with kSwiglu [rows, out_features / 2]; contiguous
  int64_t x_row_stride = 0;      // elements
  // No kernel that may still run in the stream writes weight or bias: reading them may begin before it is done.
  bool constant_weight = false;
  // 256-byte aligned; its contents do not matter. Not to be shared by launches that overlap.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;  // of gemm_workspace_bytes(shape) at least
};

// Never less for fewer rows: the workspace for the most rows serves all.
cudaError_t gemm_workspace_bytes(const GemmShape& shape, int64_t* bytes);

// Launches on `stream` and returns at once: no synchronisation, and no allocation on the device but, once for each,
// cuBLASLt's handle. Every new shape (and alignment) that goes to cuBLASLt makes a plan, a few hundred bytes on the
// host, which are kept for the next call. Works while the stream is captured, at the first call too.
// cudaErrorInvalidValue for parameters outside of what is written above, otherwise what the launch returned.
cudaError_t launch_gemm(const GemmParams& params, cudaStream_t stream);

}  // namespace qwen_plugins
