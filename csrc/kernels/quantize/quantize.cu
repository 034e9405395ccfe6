#include <algorithm>
#include <cfloat>
#include <limits>

#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/quotient.cuh"
#include "quantize.h"

namespace qwen_plugins {
namespace {

constexpr int kMaxThreads = 1024;

// The larger of all threads' values, for every thread.
__device__ __forceinline__ float largest_of_block(float largest) {
  __shared__ float of_warp[kMaxThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffU, largest, distance));
  }
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = lane < blockDim.x / 32 ? of_warp[lane] : 0.0F;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffU, largest, distance));
  }
  return largest;
}

// The scale of the block's row, whose largest magnitude is the largest of all threads'; one thread writes it.
__device__ __forceinline__ float scale_of_row(const QuantizeParams& p, float largest) {
  largest = largest_of_block(largest);
  float scale = fmaxf(__fdiv_rn(largest, p.quant_dtype == DataType::kInt8 ? 127.0F : 448.0F), FLT_MIN);
  if (!(largest <= FLT_MAX)) scale = NAN;
  if (threadIdx.x == 0) p.scales[blockIdx.x] = scale;
  return scale;
}

// The scale of all rows; 0 counts as the smallest number above it, by which zeros stay zeros and the rest saturates.
__device__ __forceinline__ float static_scale(const QuantizeParams& p) {
  const float scale = *p.static_scale;
  return scale < FLT_TRUE_MIN ? FLT_TRUE_MIN : scale;  // NaN stays
}

// Codes of elements by one scale. `kStatic`: quotients of any size saturate; else they are at most 127 or 448, or the
// scale is NaN, with which int8 codes are 0 and float8 codes 0 for finite elements and else NaN.
template <bool kStatic>
class Codes {
 public:
  __device__ __forceinline__ Codes(float scale, DataType dtype)
      : quotient_(scale), dtype_(dtype), is_number_(scale > 0.0F) {}

  __device__ __forceinline__ uint32_t of_four(const float (&values)[4]) const {
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled[i] = kStatic ? quotient_.of_any(values[i]) : quotient_(values[i]);
    if (dtype_ != DataType::kInt8) return to_float8_e4m3x4(scaled);
    if constexpr (kStatic) {
      return to_int8x4(scaled);
    } else {
      // Faster than conversions, of which a multiprocessor has few units: 1.5 * 2^23 + x has the bits of x, rounded to
      // an integer, in the lowest byte.
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = bit_cast<uint32_t>(scaled[i] + 0x1.8p23F);
      const uint32_t low = __byte_perm(bits[0], bits[1], 0x0040);
      const uint32_t high = __byte_perm(bits[2], bits[3], 0x0040);
      return is_number_ ? __byte_perm(low, high, 0x5410) : 0;
    }
  }
  __device__ __forceinline__ uint8_t of(float value) const {
    const float scaled = quotient_.of_any(value);
    return static_cast<uint8_t>(dtype_ == DataType::kInt8 ? to_int8_bits(scaled) : to_float8_e4m3_bits(scaled));
  }

 private:
  QuotientBy quotient_;
  DataType dtype_;
  bool is_number_;
};

// The larger magnitudes of the halves of a word; NaN if one is.
template <typename T>
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  return bit_cast<uint32_t>(__hmax2_nan(__habs2(bit_cast<Pair>(a)), bit_cast<Pair>(b)));
}

// A row in registers, kPacks packs a thread: all of its loads are in flight before the first is used.
template <typename T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads) quantize_in_packs(const __grid_constant__ QuantizeParams p) {
  constexpr int kElements = kVec<T>;
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int num_packs = static_cast<int>(p.columns) / kElements;
  const auto* x = reinterpret_cast<const FullPack*>(static_cast<const T*>(p.x) + row * p.x_row_stride);
  const auto index = [](int j) { return static_cast<int>(threadIdx.x + j * blockDim.x); };
  FullPack packs[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) packs[j] = index(j) < num_packs ? x[index(j)] : FullPack{};
  auto* q = reinterpret_cast<Pack<2>*>(static_cast<uint8_t*>(p.q) + row * p.columns);
  const auto store = [&](const auto& codes) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      if (index(j) >= num_packs) break;
      float values[kElements];
      unpack<T>(values, packs[j]);
      const float halves[2][4] = {{values[0], values[1], values[2], values[3]},
                                  {values[4], values[5], values[6], values[7]}};
      q[index(j)] = {codes.of_four(halves[0]), codes.of_four(halves[1])};
    }
  };
  if (p.static_scale != nullptr) return store(Codes<true>(static_scale(p), p.quant_dtype));
  uint32_t largest = 0;
#pragma unroll
  for (const FullPack& pack : packs)
#pragma unroll
    for (const uint32_t word : pack.words) largest = larger_halves<T>(word, largest);
  float halves[kElements];
  unpack<T>(halves, FullPack{largest});
  store(Codes<false>(scale_of_row(p, larger_magnitude(halves[0], halves[1])), p.quant_dtype));
}

// For float32, for rows that are too long for registers, and for sizes or addresses that are no multiples of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) quantize_in_elements(const __grid_constant__ QuantizeParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  float scale;
  if (p.static_scale != nullptr) {
    scale = static_scale(p);
  } else {
    float largest = 0.0F;
    for (int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) largest = larger_magnitude(largest, to_float(x[i]));
    scale = scale_of_row(p, largest);
  }
  const Codes<true> codes(scale, p.quant_dtype);
  auto* q = static_cast<uint8_t*>(p.q) + row * p.columns;
  for (int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) q[i] = codes.of(to_float(x[i]));
}

template <typename T>
cudaError_t launch(const QuantizeParams& p, cudaStream_t stream) {
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  const auto run = [&](auto* kernel, int64_t units, int64_t units_per_thread) {
    const int64_t threads = std::min<int64_t>(kMaxThreads, divide_up(units, 32 * units_per_thread) * 32);
    return launch_kernel(kernel, dim3(static_cast<unsigned>(p.rows)), dim3(static_cast<unsigned>(threads)), 0, device,
                         stream, p);
  };
  if constexpr (!std::is_same_v<T, float>) {
    constexpr int64_t kElements = kVec<T>;
    const int64_t num_packs = p.columns / kElements;
    const bool in_packs = p.columns % kElements == 0 && num_packs <= 4 * kMaxThreads &&
                          reinterpret_cast<uintptr_t>(p.x) % sizeof(FullPack) == 0 &&
                          reinterpret_cast<uintptr_t>(p.q) % sizeof(Pack<2>) == 0 &&
                          (p.x_row_stride % kElements == 0 || p.rows == 1);
    if (in_packs) {
      if (num_packs <= 256) return run(quantize_in_packs<T, 1>, num_packs, 1);
      if (num_packs <= 1024) return run(quantize_in_packs<T, 2>, num_packs, 2);
      return run(quantize_in_packs<T, 4>, num_packs, 4);
    }
  }
  return run(quantize_in_elements<T>, p.columns, 4);
}

}  // namespace

cudaError_t launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (p.rows < 0 || p.rows > kMost || p.columns < 1 || p.columns > kMost || p.x_row_stride < 0 ||
      (p.quant_dtype != DataType::kInt8 && p.quant_dtype != DataType::kFloat8E4M3)) {
    return cudaErrorInvalidValue;
  }
  if (p.rows == 0) return cudaSuccess;
  if (p.x == nullptr || p.q == nullptr || (p.static_scale == nullptr) == (p.scales == nullptr)) {
    return cudaErrorInvalidValue;
  }
  return with_type(p.dtype, [&](auto zero) { return launch<decltype(zero)>(p, stream); });
}

}  // namespace qwen_plugins
