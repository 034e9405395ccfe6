#include <algorithm>

#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/quotient.cuh"
#include "packed_weight.h"
#include "plain.h"
#include "silu.cuh"

namespace qwen_plugins {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 4;  // of x, which a warp multiplies by a weight row at a time

struct Sums {
  float of_row[kRows] = {};
};

// A row of a weight with the type of x. Such classes name the type of x's elements and that of sums, give the row's
// elements as operands of these, and finish a sum.
template <typename T>
class SameRow {
 public:
  using X = T;
  using Sum = float;

  __device__ __forceinline__ SameRow(const GemmParams& p, int64_t row)
      : row_(static_cast<const T*>(p.weight) + row * p.shape.in_features) {}
  __device__ __forceinline__ float operator[](int64_t k) const { return to_float(row_[k]); }
  __device__ __forceinline__ float finish(float sum, int64_t, float bias) const { return sum + bias; }

 private:
  const T* row_;
};

// A row of a packed weight: packed_weight.h.
template <typename T>
class PackedRow {
 public:
  using X = T;
  using Sum = float;

  __device__ __forceinline__ PackedRow(const GemmParams& p, int64_t row)
      : format_(p.shape.weight_format),
        row_(row),
        rows_(PackedSizes(format_, p.shape.out_features, p.shape.in_features).rows),
        codes_(static_cast<const uint32_t*>(p.weight)),
        scales_(static_cast<const uint16_t*>(p.scales)),
        zeros_(static_cast<const uint8_t*>(p.zeros)) {}
  __device__ __forceinline__ float operator[](int64_t k) const {
    const int64_t scale = (format_.group_size == 0 ? 0 : k / format_.group_size) * rows_ + row_;
    const int zero = format_.has_zeros ? zeros_[scale] : middle_code_of(format_.kind);
    return scale_at(scale) * static_cast<float>(code(k) - zero);
  }
  __device__ __forceinline__ float finish(float sum, int64_t, float bias) const { return sum + bias; }

 private:
  __device__ __forceinline__ float scale_at(int64_t index) const {
    if (format_.scale_dtype == DataType::kFloat16) return to_float(bit_cast<__half>(scales_[index]));
    return to_float(bit_cast<__nv_bfloat16>(scales_[index]));
  }
  __device__ __forceinline__ int code(int64_t k) const {
    const int bits = bits_of(format_.kind);
    const int word_k = 128 / bits;  // k of a word
    const int in_superblock = static_cast<int>(k % kPackedK), in_word = in_superblock % word_k;
    const int block = in_superblock / (2 * word_k), j = in_superblock / word_k % 2;
    const int lane = static_cast<int>(row_ % 8) * 4 + in_word % 8 / 2;
    const int half = static_cast<int>(row_ % kPackedRows) / 8;
    const int64_t superblock = k / kPackedK * (rows_ / kPackedRows) + row_ / kPackedRows;
    const int64_t word = superblock * (superblock_bytes_of(format_.kind) / 4) + block * (kPackedBlockBytes / 4) +
                         lane * 4 + half * 2 + j;
    return static_cast<int>(codes_[word] >> (in_word / 8 * bits + in_word % 2 * 16)) & ((1 << bits) - 1);
  }

  const WeightFormat format_;
  const int64_t row_, rows_;
  const uint32_t* codes_;
  const uint16_t* scales_;
  const uint8_t* zeros_;
};

// An element as an operand of a sum.
template <typename T>
__device__ __forceinline__ float to_sum(T value) {
  return to_float(value);
}
__device__ __forceinline__ float to_sum(__nv_fp8_e4m3 code) { return static_cast<float>(code); }
__device__ __forceinline__ int32_t to_sum(int8_t code) { return code; }

// A row of codes, as those of x.
template <typename Code>
class CodesRow {
 public:
  using X = Code;
  using Sum = std::conditional_t<std::is_same_v<Code, int8_t>, int32_t, float>;

  __device__ __forceinline__ CodesRow(const GemmParams& p, int64_t row)
      : p_(p),
        row_(static_cast<const Code*>(p.weight) + row * p.shape.in_features),
        in_blocks_(p.shape.weight_format.group_size != 0),
        scales_(static_cast<const float*>(p.scales) +
                (in_blocks_ ? row / kBlock * divide_up(p.shape.in_features, kBlock) : row)) {}
  __device__ __forceinline__ Sum operator[](int64_t k) const {
    if constexpr (std::is_same_v<Sum, float>) {
      if (in_blocks_) return to_sum(row_[k]) * scales_[k / kBlock];
    }
    return to_sum(row_[k]);
  }
  __device__ __forceinline__ float finish(Sum sum, int64_t x_row, float bias) const {
    const float scaled = static_cast<float>(sum) * (in_blocks_ ? 1.0F : *scales_);
    return fmaf(scaled, p_.x_scales[p_.shape.x_scale_per_row ? x_row : 0], bias);
  }

 private:
  static constexpr int kBlock = 128;  // rows and inputs that share a scale

  const GemmParams& p_;
  const Code* row_;
  const bool in_blocks_;
  const float* scales_;
};

// kRows rows of x (beyond the last row: the last again) times one row of the weight; the result is in lane 0.
template <typename T, typename Row>
__device__ __forceinline__ Sums multiply(const GemmParams& p, int64_t first_row, int64_t weight_row) {
  typename Row::Sum sums[kRows] = {};
  Sums results;
  const Row weight(p, weight_row);
  const auto* x = static_cast<const typename Row::X*>(p.x);
  for (int64_t k = threadIdx.x; k < p.shape.in_features; k += 32) {
    const auto w = weight[k];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = min(first_row + i, p.shape.rows - 1);
      sums[i] += to_sum(x[row * p.x_row_stride + k]) * w;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sums[i] += __shfl_down_sync(0xffffffffU, sums[i], distance);
    const float bias = p.bias == nullptr ? 0.0F : to_float(static_cast<const T*>(p.bias)[weight_row]);
    results.of_row[i] = weight.finish(sums[i], min(first_row + i, p.shape.rows - 1), bias);
  }
  return results;
}

// Writes an element of y, of type T or a code of the type of x.
template <typename T, typename X>
__device__ __forceinline__ void store(const GemmParams& p, int64_t index, float value) {
  if constexpr (sizeof(X) == 1) {
    if (p.shape.quantized_y) {
      const float scaled = value * finite_reciprocal(*p.y_scale);
      static_cast<uint8_t*>(p.y)[index] =
          static_cast<uint8_t>(std::is_same_v<X, int8_t> ? to_int8_bits(scaled) : to_float8_e4m3_bits(scaled));
      return;
    }
  }
  static_cast<T*>(p.y)[index] = from_float<T>(value);
}

// One warp computes a column of y, kRows rows at a time.
template <typename T, typename Row>
__global__ void __launch_bounds__(32 * kWarps) gemm_plain(const __grid_constant__ GemmParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const bool swiglu = p.shape.activation == Activation::kSwiglu;
  const int64_t columns = swiglu ? p.shape.out_features / 2 : p.shape.out_features;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (column >= columns) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows;
  for (int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows; first_row < p.shape.rows; first_row += step) {
    Sums z = multiply<T, Row>(p, first_row, column);
    const Sums up = swiglu ? multiply<T, Row>(p, first_row, columns + column) : Sums{};
    if (threadIdx.x != 0) continue;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first_row + i >= p.shape.rows) break;
      const float value = swiglu ? silu<T>(z.of_row[i]) * up.of_row[i] : z.of_row[i];
      store<T, typename Row::X>(p, (first_row + i) * columns + column, value);
    }
  }
}

template <typename T>
cudaError_t launch_type(const GemmParams& p, const DeviceProperties& device, cudaStream_t stream) {
  const int64_t columns = p.shape.out_features / (p.shape.activation == Activation::kSwiglu ? 2 : 1);
  const dim3 grid(static_cast<unsigned>(divide_up(columns, kWarps)),
                  static_cast<unsigned>(std::min<int64_t>(divide_up(p.shape.rows, kRows), 65535)));
  const auto launch = [&](auto* kernel) { return launch_kernel(kernel, grid, dim3(32, kWarps), 0, device, stream, p); };
  switch (p.shape.weight_format.kind) {
    case WeightKind::kSame:
      return launch(gemm_plain<T, SameRow<T>>);
    case WeightKind::kInt8Rows:
      return launch(gemm_plain<T, CodesRow<int8_t>>);
    case WeightKind::kFp8Rows:
      return launch(gemm_plain<T, CodesRow<__nv_fp8_e4m3>>);
    default:
      return launch(gemm_plain<T, PackedRow<T>>);
  }
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t, cudaStream_t stream) {
  return with_type(params.shape.dtype, [&](auto zero) { return launch_type<decltype(zero)>(params, device, stream); });
}

}  // namespace

GemmKernel plain_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kPlain;
  kernel.name = "plain";
  kernel.takes = [](const GemmParams&, const DeviceProperties&, int32_t) { return true; };
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = [](const GemmParams&, const DeviceProperties&, int32_t) { return false; };
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
