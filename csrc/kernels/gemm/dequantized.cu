#include <algorithm>

#include "cublas_lt_gemm.h"
#include "dequantized.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "packed_weight.h"
#include "swiglu.h"

namespace qwen_plugins {
namespace {

constexpr int64_t kMinRows = 17;  // with fewer, reading and writing the weight costs more than it saves
constexpr int64_t kMaxPartBytes = int64_t{64} << 20;  // of the weight
constexpr int64_t kMaxSwigluRows = 4096;              // multiplied at a time where SwiGLU follows
constexpr int kWarps = 4;
constexpr int64_t kMaxInputs = int64_t{65535} * kPackedK;  // the limit of a launch's grid

struct DequantizeArguments {
  const uint32_t* codes;
  const void* scales;
  const uint8_t* zeros;  // null: none
  void* to;              // [rows, in_features]
  int64_t scale_rows;    // from one group's scales to the next
  int64_t in_features;
  int64_t first_row, rows;  // of the weight
  int32_t group_size;       // 0: all columns
  DataType scale_dtype;
};

// Rearranges four registers of four neighbouring lanes: lane i of them gets register i of all, in their order.
__device__ __forceinline__ void transpose_among_four(uint32_t (&values)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) != 0) continue;
      const uint32_t sent = upper ? values[i] : values[i + distance];
      const uint32_t received = __shfl_xor_sync(0xffffffffU, sent, distance);
      values[i] = upper ? received : values[i];
      values[i + distance] = upper ? values[i + distance] : received;
    }
  }
}

// A warp dequantizes 16 rows (x) of 128 columns (y).
template <typename T, WeightKind kKind>
class SuperblockDequantizer {
 public:
  __device__ __forceinline__ SuperblockDequantizer(const DequantizeArguments& p, int64_t row_block,
                                                   int64_t column_block)
      : p_(p), first_row_(row_block * kPackedRows), first_k_(column_block * kPackedK) {
    const int64_t superblock = column_block * (p.scale_rows / kPackedRows) + row_block;
    codes_ = p.codes + superblock * (superblock_bytes_of(kKind) / 4);
  }

  __device__ __forceinline__ void run() const {
#pragma unroll
    for (int block = 0; block < superblock_bytes_of(kKind) / kPackedBlockBytes; ++block) {
      const FullPack words = reinterpret_cast<const FullPack*>(codes_)[block * 32 + threadIdx.x];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row_ + 8 * half + threadIdx.x / 4;
        if constexpr (kKind == WeightKind::kInt4) {
          write(row, first_k_ + 64 * block, words.words[2 * half], 0);
          write(row, first_k_ + 64 * block + 32, words.words[2 * half + 1], 0);
        } else {
          write(row, first_k_ + 32 * block, words.words[2 * half], words.words[2 * half + 1]);
        }
      }
    }
  }

 private:
  // Writes 32 columns, of which the lane has four pairs of neighbours, eight columns apart.
  __device__ __forceinline__ void write(int64_t row, int64_t k, uint32_t word0, uint32_t word1) const {
    const int64_t index = (p_.group_size == 0 ? 0 : k / p_.group_size) * p_.scale_rows + row;
    const float scale = p_.scale_dtype == DataType::kFloat16
                            ? to_float(static_cast<const __half*>(p_.scales)[index])
                            : to_float(static_cast<const __nv_bfloat16*>(p_.scales)[index]);
    const int zero = p_.zeros == nullptr ? middle_code_of(kKind) : p_.zeros[index];
    constexpr int kBits = bits_of(kKind);
    constexpr uint32_t kMask = (1U << kBits) - 1;
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = (kBits == 8 && i >= 2 ? word1 : word0) >> (kBits == 8 ? i % 2 * 8 : i * 4);
      const float low = scale * static_cast<float>(static_cast<int>(word & kMask) - zero);
      const float high = scale * static_cast<float>(static_cast<int>(word >> 16 & kMask) - zero);
      pairs[i] = bit_cast<uint32_t>(pair_of(low, high));
    }
    transpose_among_four(pairs);
    const int64_t column = k + threadIdx.x % 4 * 8;
    const int64_t to_row = row - p_.first_row;
    if (to_row >= 0 && to_row < p_.rows && column < p_.in_features) store(to_row, column, pairs);
  }
  static __device__ __forceinline__ auto pair_of(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) return __floats2half2_rn(low, high);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return __floats2bfloat162_rn(low, high);
  }
  __device__ __forceinline__ void store(int64_t row, int64_t column, const uint32_t (&pairs)[4]) const {
    auto* const to = static_cast<uint16_t*>(p_.to) + row * p_.in_features + column;
    if (p_.in_features % 8 == 0) {
      *reinterpret_cast<FullPack*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i < p_.in_features) to[i] = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
    }
  }

  const DequantizeArguments& p_;
  const int64_t first_row_, first_k_;
  const uint32_t* codes_;
};

template <typename T, WeightKind kKind>
__global__ void __launch_bounds__(32 * kWarps) dequantize(const __grid_constant__ DequantizeArguments p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t first_block = p.first_row / kPackedRows;
  const int64_t row_block = first_block + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row_block * kPackedRows >= p.first_row + p.rows) return;
  SuperblockDequantizer<T, kKind>(p, row_block, blockIdx.y).run();
}

// Dequantizes `rows` rows of the weight from `first_row` on.
cudaError_t launch_dequantize(const GemmParams& params, int64_t first_row, int64_t rows, void* to,
                              const DeviceProperties& device, cudaStream_t stream) {
  const GemmShape& shape = params.shape;
  const WeightFormat& format = shape.weight_format;
  const PackedSizes sizes(format, shape.out_features, shape.in_features);
  DequantizeArguments arguments{};
  arguments.codes = static_cast<const uint32_t*>(params.weight);
  arguments.scales = params.scales;
  arguments.zeros = static_cast<const uint8_t*>(params.zeros);
  arguments.to = to;
  arguments.scale_rows = sizes.rows;
  arguments.in_features = shape.in_features;
  arguments.first_row = first_row;
  arguments.rows = rows;
  arguments.group_size = format.group_size;
  arguments.scale_dtype = format.scale_dtype;
  const int64_t blocks = divide_up(first_row + rows, kPackedRows) - first_row / kPackedRows;
  const dim3 grid(static_cast<unsigned>(divide_up(blocks, kWarps)), static_cast<unsigned>(sizes.k / kPackedK));
  const auto launch = [&](auto* kernel) {
    return launch_kernel(kernel, grid, dim3(32, kWarps), 0, device, stream, arguments);
  };
  const bool is_half = shape.dtype == DataType::kFloat16;
  if (format.kind == WeightKind::kInt4) {
    return is_half ? launch(dequantize<__half, WeightKind::kInt4>)
                   : launch(dequantize<__nv_bfloat16, WeightKind::kInt4>);
  }
  return is_half ? launch(dequantize<__half, WeightKind::kInt8>) : launch(dequantize<__nv_bfloat16, WeightKind::kInt8>);
}

// The columns of y that are computed at a time.
int64_t part_columns(const GemmShape& shape) {
  const int64_t weight_rows = shape.activation == Activation::kSwiglu ? 2 : 1;  // of a column
  const int64_t most = std::max<int64_t>(kMaxPartBytes / (2 * shape.in_features * weight_rows) / 64 * 64, 64);
  return std::min(most, columns_of(shape));
}

// Where the parts of the workspace begin, after cuBLASLt's own.
struct Workspace {
  int64_t weight, z, total;
  explicit Workspace(const GemmShape& shape) {
    const bool swiglu = shape.activation == Activation::kSwiglu;
    const int64_t rows = part_columns(shape) * (swiglu ? 2 : 1);
    weight = kCublasLtWorkspaceBytes;
    z = weight + divide_up(2 * rows * shape.in_features, 256) * 256;
    total = z + (swiglu ? 2 * rows * std::min(shape.rows, kMaxSwigluRows) : 0);
  }
};

// Multiplies by gate and up rows, which are together in the workspace, and applies SwiGLU. The bias is separate for
// both, so there are two products.
cudaError_t launch_swiglu_part(const GemmParams& part, int32_t variant, int64_t first_column, int64_t columns,
                               cudaStream_t stream) {
  auto* const workspace = static_cast<char*>(part.workspace);
  const Workspace at(part.shape);
  const int64_t all_columns = columns_of(part.shape);
  SwigluParams swiglu;
  swiglu.gate_up = workspace + at.z;
  swiglu.y = static_cast<char*>(part.y) + 2 * first_column;
  swiglu.gate_up_row_stride = 2 * columns;
  swiglu.y_row_stride = all_columns;
  swiglu.rows = part.shape.rows;
  swiglu.size = columns;
  swiglu.dtype = part.shape.dtype;
  cudaError_t error = cudaSuccess;
  for (int half = 0; half < 2 && error == cudaSuccess; ++half) {
    GemmParams product = part;
    product.shape.out_features = columns;
    product.shape.activation = Activation::kNone;
    product.weight = workspace + at.weight + 2 * half * columns * part.shape.in_features;
    if (part.bias != nullptr) {
      product.bias = static_cast<const char*>(part.bias) + 2 * (half * all_columns + first_column);
    }
    error = launch_cublas_lt(product, variant, workspace + at.z + 2 * half * columns, 2 * columns, stream);
  }
  return error == cudaSuccess ? launch_swiglu(swiglu, stream) : error;
}

cudaError_t launch_part(const GemmParams& p, int32_t variant, int64_t first_column, int64_t columns,
                        const DeviceProperties& device, cudaStream_t stream) {
  const Workspace at(p.shape);
  char* const weight = static_cast<char*>(p.workspace) + at.weight;
  cudaError_t error = launch_dequantize(p, first_column, columns, weight, device, stream);
  if (p.shape.activation == Activation::kNone) {
    if (error != cudaSuccess) return error;
    GemmParams product = p;
    product.shape.out_features = columns;
    product.weight = weight;
    if (p.bias != nullptr) product.bias = static_cast<const char*>(p.bias) + 2 * first_column;
    return launch_cublas_lt(product, variant, static_cast<char*>(p.y) + 2 * first_column, p.shape.out_features, stream);
  }
  if (error == cudaSuccess) {
    error = launch_dequantize(p, columns_of(p.shape) + first_column, columns,
                              weight + 2 * columns * p.shape.in_features, device, stream);
  }
  const int64_t rows = std::min(p.shape.rows, kMaxSwigluRows);
  for (int64_t row = 0; row < p.shape.rows && error == cudaSuccess; row += rows) {
    const GemmParams part = rows_of(p, row, std::min(rows, p.shape.rows - row));
    error = launch_swiglu_part(part, variant, first_column, columns, stream);
  }
  return error;
}

cudaError_t launch(const GemmParams& p, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  const int64_t columns = columns_of(p.shape), part = part_columns(p.shape);
  cudaError_t error = cudaSuccess;
  for (int64_t column = 0; column < columns && error == cudaSuccess; column += part) {
    error = launch_part(p, variant, column, std::min(part, columns - column), device, stream);
  }
  return error;
}

bool takes(const GemmParams& p, const DeviceProperties& device, int32_t) {
  return is_packed(p.shape.weight_format) && p.shape.dtype != DataType::kFloat32 && p.shape.rows >= kMinRows &&
         device.major >= 8 && p.shape.in_features <= kMaxInputs && has_cublas_lt();
}

int64_t workspace_bytes(const GemmShape& shape) {
  const bool serves = is_packed(shape.weight_format) && shape.dtype != DataType::kFloat32 && shape.rows >= kMinRows;
  return serves ? Workspace(shape).total : 0;
}

}  // namespace

GemmKernel dequantized_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kDequantized;
  kernel.name = "dequantized";
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = takes;
  kernel.workspace_bytes = workspace_bytes;
  kernel.launch = launch;
  return kernel;
}

}  // namespace qwen_plugins
