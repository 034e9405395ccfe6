// silu(g) = g / (1 + exp(-g)), for SwiGLU alone and as the epilogue of a GEMM.
#pragma once

#include <type_traits>

namespace qwen_plugins {

// Computed in float32, to the precision that a result of type T needs.
template <typename T>
__device__ __forceinline__ float silu(float gate) {
  // The fast exponential is off by a few units in the last place of a float32, too much for float32 results alone.
  if constexpr (std::is_same_v<T, float>) return gate / (1.0F + expf(-gate));
  return __fdividef(gate, 1.0F + __expf(-gate));
}

}  // namespace qwen_plugins
