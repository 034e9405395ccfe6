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

// The scale of the block's row. `largest()` returns the largest magnitude of a thread's elements.
template <typename Largest>
__device__ __forceinline__ float scale_of_row(const QuantizeParams& p, const Largest& largest) {
  if (p.static_scale != nullptr) return *p.static_scale;
  const float magnitude = largest_of_block(largest());
  float scale = fmaxf(__fdiv_rn(magnitude, p.quant_dtype == DataType::kInt8 ? 127.0F : 448.0F), FLT_MIN);
  if (!(magnitude <= FLT_MAX)) scale = NAN;
  if (threadIdx.x == 0) p.scales[blockIdx.x] = scale;
  return scale;
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
  const float scale = scale_of_row(p, [&] {
    float largest = 0.0F;
#pragma unroll
    for (const FullPack& pack : packs) {
      float values[kElements];
      unpack<T>(values, pack);
#pragma unroll
      for (const float value : values) largest = larger_magnitude(largest, value);
    }
    return largest;
  });
  const QuotientBy quotient(scale);
  auto* q = reinterpret_cast<Pack<2>*>(static_cast<uint8_t*>(p.q) + row * p.columns);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    if (index(j) >= num_packs) break;
    float values[kElements];
    unpack<T>(values, packs[j]);
    Pack<2> codes;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      float part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] = quotient(values[4 * word + i]);
      codes.words[word] = p.quant_dtype == DataType::kInt8 ? to_int8x4(part) : to_float8_e4m3x4(part);
    }
    q[index(j)] = codes;
  }
}

// For float32, for rows that are too long for registers, and for sizes or addresses that are no multiples of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) quantize_in_elements(const __grid_constant__ QuantizeParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const float scale = scale_of_row(p, [&] {
    float largest = 0.0F;
    for (int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) {
      largest = larger_magnitude(largest, to_float(x[i]));
    }
    return largest;
  });
  const QuotientBy quotient(scale);
  auto* q = static_cast<uint8_t*>(p.q) + row * p.columns;
  for (int64_t i = threadIdx.x; i < p.columns; i += blockDim.x) {
    const float value = quotient(to_float(x[i]));
    q[i] = static_cast<uint8_t>(p.quant_dtype == DataType::kInt8 ? to_int8_bits(value) : to_float8_e4m3_bits(value));
  }
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
