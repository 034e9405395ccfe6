// wgmma of 8-bit codes (sm_90a): int8 summed in int32, e4m3 in float32. wgmma.cuh has the rest.
#pragma once

#include "wgmma.cuh"

namespace qwen_plugins {

// c [64 x 8 kTiles] += a [64 x 32] · b [8 kTiles x 32]^T, or c = a · b^T if not `accumulate`, with codes of int8 where
// c is int32_t, and of e4m3 where it is float. The layouts are those of wgmma.cuh, with two codes for each 16-bit
// element.
template <typename Sum, int kTiles>
__device__ __forceinline__ void wgmma_of_codes(Sum (&c)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<Sum, int32_t>) {
    QWEN_WGMMA_OF_TILES(QWEN_WGMMA_ACCUMULATE, "k32.s32.s8.s8", "", "+r", c, a, b, static_cast<int>(accumulate));
  } else {
    static_assert(std::is_same_v<Sum, float>);
    QWEN_WGMMA_OF_TILES(QWEN_WGMMA_ACCUMULATE, "k32.f32.e4m3.e4m3", ", 1, 1", "+f", c, a, b,
                        static_cast<int>(accumulate));
  }
}

}  // namespace qwen_plugins
