#include <algorithm>
#include <limits>

#include "gather_rows.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"

namespace qwen_plugins {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridY = 65535;

// Unit is what a thread copies at a time.
template <typename Unit>
__global__ void __launch_bounds__(kThreads) gather_rows(const __grid_constant__ GatherRowsParams p, int64_t row_units) {
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int64_t id = p.ids[row];
  const bool known = id >= 0 && id < p.table_rows;
  const Unit* from = static_cast<const Unit*>(p.table) + (known ? id : 0) * row_units;
  Unit* to = static_cast<Unit*>(p.y) + row * row_units;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < row_units; i += step) {
    to[i] = known ? from[i] : Unit{};
  }
}

template <typename Unit>
cudaError_t launch(const GatherRowsParams& p, cudaStream_t stream) {
  const int64_t row_units = p.row_size * size_of(p.dtype) / static_cast<int64_t>(sizeof(Unit));
  const dim3 grid(static_cast<unsigned>(p.rows),
                  static_cast<unsigned>(std::min(divide_up(row_units, kThreads), kMaxGridY)));
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return launch_kernel(gather_rows<Unit>, grid, dim3(kThreads), 0, device, stream, p, row_units);
}

}  // namespace

cudaError_t launch_gather_rows(const GatherRowsParams& p, cudaStream_t stream) {
  const int64_t row_bytes = p.row_size * size_of(p.dtype);
  if (p.rows < 0 || p.rows > std::numeric_limits<int32_t>::max() || row_bytes <= 0 || p.table_rows < 0) {
    return cudaErrorInvalidValue;
  }
  if (p.rows == 0) return cudaSuccess;
  if ((p.table == nullptr && p.table_rows > 0) || p.ids == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  const auto unaligned =
      reinterpret_cast<uintptr_t>(p.table) | reinterpret_cast<uintptr_t>(p.y) | static_cast<uintptr_t>(row_bytes);
  if (unaligned % sizeof(FullPack) == 0) return launch<FullPack>(p, stream);
  if (unaligned % 4 == 0) return launch<uint32_t>(p, stream);
  return unaligned % 2 == 0 ? launch<uint16_t>(p, stream) : launch<uint8_t>(p, stream);
}

}  // namespace qwen_plugins
