// Dequantization in registers: words of the packed weight (packed_weight.h) to pairs of neighbours in k, which are the
// registers of operand a of mma and wgmma. A weight is scale * (code - zero), rounded once to the type of x.
#pragma once

#include "gemm.h"
#include "kernels/common/elements.cuh"

namespace qwen_plugins {

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

// Twice the same 16 bits.
__device__ __forceinline__ uint32_t twice(uint32_t bits) { return __byte_perm(bits, bits, 0x1010); }

// (value & mask) | base: one instruction, lop3.
__device__ __forceinline__ uint32_t masked_onto(uint32_t value, uint32_t mask, uint32_t base) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "r"(mask), "r"(base));
  return result;
}

// The scale and the zero point of a weight row.
//
// A code is written into the mantissa of a large number (1024 in float16, 128 in bfloat16), and the same number plus
// the zero point subtracted, which is exact. bfloat16's mantissa has room for seven bits of eight: the number is 128 or
// 256, by the eighth.
template <typename T, WeightKind kKind>
class Dequantizer {
 public:
  Dequantizer() = default;
  // `scale`: the bits of one T.
  __device__ __forceinline__ Dequantizer(uint32_t scale, uint32_t zero)
      : scale_(twice(scale)), zero_(offset(zero)), high_zero_(0xd400d400 + twice(zero) * 16) {}

  // The weights of 16 columns of k. The codes of 32 columns are in one word of int4 (x) or two of int8; `step` is 0 for
  // the first 16, or 1.
  __device__ __forceinline__ void dequantize(uint32_t (&pairs)[2], uint2 words, int step) const {
    if constexpr (kKind == WeightKind::kInt4) {
      const uint32_t word = words.x >> (8 * step);
      pairs[0] = weights(masked_onto(word, 0x000f000f, kBase));
      if constexpr (kIsHalf) {
        // 1024 + 16 code: a sixteenth of it, minus 64 and the zero point, takes no shift.
        const PairOf<T> sixteenth = pair(0x2c002c00);
        pairs[1] = scaled(__hfma2(pair(masked_onto(word, 0x00f000f0, kBase)), sixteenth, pair(high_zero_)));
      } else {
        pairs[1] = weights(masked_onto(word >> 4, 0x000f000f, kBase));
      }
    } else {
      const uint32_t word = step == 0 ? words.x : words.y;
      pairs[0] = even_bytes(word);
      pairs[1] = odd_bytes(word);
    }
  }

 private:
  static constexpr bool kIsHalf = std::is_same_v<T, __half>;
  static constexpr uint32_t kBase = kIsHalf ? 0x64006400 : 0x43004300;

  // What is subtracted from a code in kBase; of eight bits in bfloat16, from the code minus 128.
  static __device__ __forceinline__ uint32_t offset(uint32_t zero) {
    if constexpr (!kIsHalf && kKind == WeightKind::kInt8) {
      return twice(bit_cast<uint16_t>(__int2bfloat16_rn(static_cast<int>(zero) - 128)));
    } else {
      return kBase + twice(zero);
    }
  }
  static __device__ __forceinline__ PairOf<T> pair(uint32_t bits) { return bit_cast<PairOf<T>>(bits); }
  __device__ __forceinline__ uint32_t scaled(PairOf<T> codes) const {
    return bit_cast<uint32_t>(__hmul2(codes, pair(scale_)));
  }
  __device__ __forceinline__ uint32_t weights(uint32_t codes) const {
    return scaled(__hsub2(pair(codes), pair(zero_)));
  }
  __device__ __forceinline__ uint32_t even_bytes(uint32_t word) const {
    if constexpr (kIsHalf) return weights(__byte_perm(word, kBase, 0x5250));
    const uint32_t number = (word & 0x00800080) ^ 0x43804380;  // 128 for a code of 128 and more, else 256
    const auto code = __hsub2(pair(masked_onto(word, 0x007f007f, kBase)), pair(number));
    return weights(bit_cast<uint32_t>(code));
  }
  __device__ __forceinline__ uint32_t odd_bytes(uint32_t word) const {
    if constexpr (kIsHalf) return weights(__byte_perm(word, kBase, 0x5351));
    return even_bytes(word >> 8);
  }

  uint32_t scale_, zero_;
  uint32_t high_zero_;  // -(64 + zero) in float16, for codes of int4 in the upper half of a byte
};

}  // namespace qwen_plugins
