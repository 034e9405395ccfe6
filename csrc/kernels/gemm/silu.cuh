// silu(g) = g / (1 + exp(-g)), for SwiGLU alone and after a matrix product.
#pragma once

#include <type_traits>

namespace qwen_plugins {

// In float32, as precise as a result of type T can show.
template <typename T>
__device__ __forceinline__ float silu(float gate) {
  // The fast exponential is good to a few units in the last place of a float32: too little only for float32 itself.
  if constexpr (std::is_same_v<T, float>) return gate / (1.0F + expf(-gate));
  return __fdividef(gate, 1.0F + __expf(-gate));
}

}  // namespace qwen_plugins
