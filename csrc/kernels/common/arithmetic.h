// Arithmetic of sizes, for host and device.
#pragma once

#include <cuda_runtime_api.h>

namespace qwen_plugins {

// Returns value / by, rounded up, for value >= 0 and by > 0.
template <typename Value, typename By>
__host__ __device__ constexpr auto divide_up(Value value, By by) {
  return (value + by - 1) / by;
}

}  // namespace qwen_plugins
