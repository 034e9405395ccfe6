#include <algorithm>
#include <limits>

#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "silu.cuh"
#include "swiglu.h"

namespace qwen_plugins {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_in_packs(const __grid_constant__ SwigluParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  constexpr int kElements = kVec<T>;
  const int64_t row = blockIdx.x;
  const auto* gates = reinterpret_cast<const FullPack*>(static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride);
  auto* out = reinterpret_cast<FullPack*>(static_cast<T*>(p.y) + row * p.y_row_stride);
  const int64_t num_packs = p.size / kElements;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < num_packs; i += step) {
    float gate[kElements], up[kElements];
    const FullPack gate_pack = gates[i];
    const FullPack up_pack = gates[num_packs + i];
    unpack<T>(gate, gate_pack);
    unpack<T>(up, up_pack);
#pragma unroll
    for (int j = 0; j < kElements; ++j) gate[j] = silu<T>(gate[j]) * up[j];
    out[i] = pack<T>(gate);
  }
}

// For sizes or addresses that are no multiples of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_in_elements(const __grid_constant__ SwigluParams p) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const T* gates = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride;
  T* out = static_cast<T*>(p.y) + row * p.y_row_stride;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < p.size; i += step) {
    out[i] = from_float<T>(silu<T>(to_float(gates[i])) * to_float(gates[p.size + i]));
  }
}

template <typename T>
cudaError_t launch(const SwigluParams& p, cudaStream_t stream) {
  constexpr int kElements = kVec<T>;
  const auto addresses = reinterpret_cast<uintptr_t>(p.gate_up) | reinterpret_cast<uintptr_t>(p.y);
  const bool in_packs = addresses % sizeof(FullPack) == 0 && p.size % kElements == 0 &&
                        ((p.gate_up_row_stride % kElements == 0 && p.y_row_stride % kElements == 0) || p.rows == 1);
  const int64_t units = in_packs ? p.size / kElements : p.size;
  const dim3 grid(static_cast<unsigned>(p.rows),
                  static_cast<unsigned>(std::min(divide_up(units, kThreads), kMaxGridY)));
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return launch_kernel(in_packs ? swiglu_in_packs<T> : swiglu_in_elements<T>, grid, dim3(kThreads), 0, device, stream,
                       p);
}

}  // namespace

cudaError_t launch_swiglu(const SwigluParams& given, cudaStream_t stream) {
  SwigluParams p = given;
  if (p.y_row_stride == 0) p.y_row_stride = p.size;
  if (p.rows < 0 || p.rows > std::numeric_limits<int32_t>::max() || p.size <= 0 ||
      ((p.gate_up_row_stride < 2 * p.size || p.y_row_stride < p.size) && p.rows > 1)) {
    return cudaErrorInvalidValue;
  }
  if (p.rows == 0) return cudaSuccess;
  if (p.gate_up == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  return with_type(p.dtype, [&](auto zero) { return launch<decltype(zero)>(p, stream); });
}

}  // namespace qwen_plugins
