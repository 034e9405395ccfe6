// The GEMM of a linear layer: what the host can launch.
//
//   z = x · weight^T + bias,  accumulated in float32
//   y = z,  or with kSwiglu  y = silu(z_gate) * z_up,  the first half of z's columns being the gate
//
// The weight has the type of x, or is quantized: weight = scale * (code - zero), with a scale and a zero point for each
// row and group of inputs. Quantized weights are packed for the kernels: packed_weight.h.
//
// Or x and the weight are codes of 8 bits both, int8 or e4m3, and
//
//   z[m, n] = (sum over k of x[m, k] * weight[n, k]) * weight_scale[n] * x_scale[m] + bias[n]
//
// summed exactly in int32, or of e4m3 in float32 (on Hopper's tensor cores in registers of 14 bits, whose sums of 128 k
// are added in float32). y can be codes, too: saturate(round(y * (1 / y_scale))), rounded to nearest even.
//
// Several kernels can compute it; GemmParams::choice names one, and rules decide where it does not. By the rules few
// rows (decoding; up to 16, on Hopper up to 96, with SwiGLU up to 128) run in kernels of this library that read the
// weight at the memory's bandwidth. Many rows (prompts) run on Hopper in a kernel of this library where it is faster
// than cuBLASLt, mostly with SwiGLU; else in cuBLASLt where it can be loaded, otherwise in the kernel for few rows, 16
// rows at a time. docs/gemm.md has the exact rules.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/api.h"
#include "kernels/common/data_type.h"

namespace qwen_plugins {

// The limit of rows, in_features and out_features.
constexpr int64_t kMaxGemmSize = (int64_t{1} << 30) - 1;

enum class Activation : int32_t { kNone = 0, kSwiglu = 1 };

// How a weight is stored. The values are part of serialised engines: none may change.
enum class WeightKind : int32_t {
  kSame = 0,  // elements of the type of x
  kInt8 = 1,  // codes of 0 to 255
  kInt4 = 2,  // codes of 0 to 15
  // x and the weight are signed codes, in rows:
  kInt8Rows = 3,
  kFp8Rows = 4,  // e4m3
};
struct WeightFormat {
  WeightKind kind = WeightKind::kSame;
  // The rest is of quantized weights alone.
  // Inputs that share a scale: 32, 64 or 128; 0: all. With kFp8Rows 128, for blocks of 128 rows times 128 inputs, or 0;
  // with kInt8Rows 0.
  int32_t group_size = 0;
  bool has_zeros = false;  // else all zero points are in the middle: 8 or 128; never with codes in rows
  // kFloat16 or kBFloat16, whatever the type of x; with codes in rows kFloat32.
  DataType scale_dtype = DataType::kFloat16;
};
constexpr bool is_quantized(const WeightFormat& format) { return format.kind != WeightKind::kSame; }
// Whether the weight is packed, and x is not quantized.
constexpr bool is_packed(const WeightFormat& format) {
  return format.kind == WeightKind::kInt8 || format.kind == WeightKind::kInt4;
}
// Whether x is codes, too.
constexpr bool has_quantized_x(const WeightFormat& format) {
  return format.kind == WeightKind::kInt8Rows || format.kind == WeightKind::kFp8Rows;
}
// The most inputs with kInt8Rows: sums of more could overflow int32.
constexpr int64_t kMaxInt8Inputs = (int64_t{1} << 17) - 1;

// A kernel and its variant: kByRules, or what gemm_choice_from_name gives (choice.h). A number means the same kernel in
// every version of the library; serialised engines hold it.
enum class GemmChoice : int32_t { kByRules = 0 };

// What the choice of a kernel and the size of its workspace depend on.
struct GemmShape {
  int64_t rows = 0;          // of x, at most kMaxGemmSize; 0 launches nothing
  int64_t in_features = 0;   // K, from 1 to kMaxGemmSize
  int64_t out_features = 0;  // N, likewise: of z, so twice the columns of y with kSwiglu
  Activation activation = Activation::kNone;
  // kFloat32, kFloat16 or kBFloat16: of x, bias and y, where these are not codes.
  DataType dtype = DataType::kFloat16;
  WeightFormat weight_format;
  // The rest is of quantized x alone.
  bool x_scale_per_row = false;  // else one scale for all
  bool quantized_y = false;      // y is codes of the kind of x
};

// The columns of y.
constexpr int64_t columns_of(const GemmShape& shape) {
  return shape.activation == Activation::kSwiglu ? shape.out_features / 2 : shape.out_features;
}
// The types of the elements of x and y.
constexpr DataType x_type_of(const GemmShape& shape) {
  if (!has_quantized_x(shape.weight_format)) return shape.dtype;
  return shape.weight_format.kind == WeightKind::kInt8Rows ? DataType::kInt8 : DataType::kFloat8E4M3;
}
constexpr DataType y_type_of(const GemmShape& shape) { return shape.quantized_y ? x_type_of(shape) : shape.dtype; }

struct GemmParams {
  GemmShape shape;
  const void* x = nullptr;  // [rows, in_features]
  // [out_features, in_features], contiguous; or the packed codes of a quantized weight, 16-byte aligned.
  const void* weight = nullptr;
  // Of a quantized weight: packed, 16-byte aligned. With codes in rows float32, contiguous: [out_features], or in
  // blocks [out_features / 128, in_features / 128], both rounded up.
  const void* scales = nullptr;
  const void* zeros = nullptr;      // of a quantized weight with zero points, packed, 16-byte aligned; else null
  const float* x_scales = nullptr;  // of quantized x: [rows] with x_scale_per_row, else [1]
  const float* y_scale = nullptr;   // of quantized y: [1]
  const void* bias = nullptr;       // [out_features]; null: none
  void* y = nullptr;                // [rows, out_features], with kSwiglu [rows, out_features / 2]; contiguous
  int64_t x_row_stride = 0;         // elements
  // The caller promises that no kernel that may still run in the stream writes weight, scales, zeros, bias or y_scale;
  // then they may be read before the previous kernel has finished.
  bool constant_weight = false;
  // The rules decide where this kernel cannot compute the GEMM on the current device (another GPU, misaligned
  // addresses, no cuBLASLt) or does not exist in this build: a choice makes no launch fail.
  GemmChoice choice = GemmChoice::kByRules;
  // 256-byte aligned; its contents do not matter. Launches that may overlap need workspaces of their own.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;  // at least gemm_workspace_bytes(shape, choice)
};

// Gives the size of the workspace that a launch needs. With one choice it never decreases with the number of rows: the
// workspace for the most rows serves all. cudaErrorInvalidValue for a shape that launch_gemm refuses.
QWEN_PLUGINS_API cudaError_t gemm_workspace_bytes(const GemmShape& shape, GemmChoice choice, int64_t* bytes);

// Launches on `stream` and returns at once, without synchronisation. Allocates nothing on the device but cuBLASLt's
// handle, once for each device. For every new shape (and alignment) that cuBLASLt computes, a plan of a few hundred
// bytes is kept on the host. Works while the stream is captured, at the first call, too. cudaErrorInvalidValue for
// parameters outside of what is written above, otherwise what the launch returned.
QWEN_PLUGINS_API cudaError_t launch_gemm(const GemmParams& params, cudaStream_t stream);

// Whether the library contains the kernels that run on Hopper alone: 90 was among CMAKE_CUDA_ARCHITECTURES.
QWEN_PLUGINS_API bool has_hopper_kernels();

}  // namespace qwen_plugins
