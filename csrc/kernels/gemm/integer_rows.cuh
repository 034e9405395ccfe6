// One or two rows of x as integers, which mma multiplies by codes of int4: these become operands with half of the
// instructions that float16 takes.
//
// The 128 k that a row has in a chunk get a power of two as their scale, by which the largest is less than 2^30, and
// are rounded. An element is exact if it is at least 2^-19 of the largest, since it has 11 bits at most (8 with
// bfloat16); what smaller ones lose is at most 2^-30 of the largest, less than float32 sums lose. (Where all are
// smaller than 2^-97, as they can be with bfloat16, it is at most 2^-127.) Sums of products over a chunk are exact, in
// int32: those of a lower pair are below 2^31 with any uint8 as zero point, those of an upper pair half of that.
//
// An integer is four signed digits of 8 bits, the upper pair and the lower pair. Digits are columns of mma's operand b:
// columns 4 r to 4 r + 3 are those of row r, the highest first, so that a lane has the sums of a pair.
#pragma once

#include "kernels/common/elements.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "packed_weight.h"

namespace qwen_plugins {

constexpr int kIntegerRows = 2;
// A chunk in shared memory: 8 columns of 128 digits, and for each pair its scale, float32, and the sum of the 128 k,
// int32, by which the zero point is multiplied. Block i of 16 digits of column c is in place i ^ c, so that both writes
// of a column and ldmatrix's reads of a block of all columns are without bank conflicts.
constexpr int kIntegerDigitBytes = 8 * kPackedK;
constexpr int kIntegerChunkBytes = kIntegerDigitBytes + 4 * 8;

// Gives the integers of a row's 128 elements, of which each lane of a warp has four, and returns their scale: NaN where
// an element is infinite or NaN. All results of the row are NaN then, also those that would be infinite.
__device__ __forceinline__ float to_integers(const float (&x)[4], int32_t (&integers)[4]) {
  uint32_t bits = 0;  // of the largest absolute value
#pragma unroll
  for (int i = 0; i < 4; ++i) bits = max(bits, bit_cast<uint32_t>(x[i]) & 0x7fffffffU);
  bits = __reduce_max_sync(0xffffffffU, bits);
  // Where all are smaller than 2^-97, integers are multiples of 2^-126.
  const uint32_t exponent = max(bits >> 23, 30U);
  const float factor = bit_cast<float>((283U - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 4; ++i) integers[i] = __float2int_rn(x[i] * factor);
  return bits >= 0x7f800000U ? bit_cast<float>(0x7fffffffU) : bit_cast<float>((exponent - 29U) << 23);
}

// The digits of four integers, as words: word c has the c-th digit of each, the lowest first.
__device__ __forceinline__ void to_digits(const int32_t (&integers)[4], uint32_t (&words)[4]) {
  uint32_t digits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) digits[i] = (static_cast<uint32_t>(integers[i]) + 0x00808080U) ^ 0x00808080U;
  const uint32_t low[2] = {__byte_perm(digits[0], digits[1], 0x5140), __byte_perm(digits[2], digits[3], 0x5140)};
  const uint32_t high[2] = {__byte_perm(digits[0], digits[1], 0x7362), __byte_perm(digits[2], digits[3], 0x7362)};
  words[0] = __byte_perm(low[0], low[1], 0x5410);
  words[1] = __byte_perm(low[0], low[1], 0x7632);
  words[2] = __byte_perm(high[0], high[1], 0x5410);
  words[3] = __byte_perm(high[0], high[1], 0x7632);
}

// By a warp: loads a chunk of the rows of x, whose first k is at `x`. There are `k` from there on, perhaps none;
// others are 0.
template <typename T>
__device__ __forceinline__ void load_integer_chunk(const T* x, int64_t row_stride, int rows, int k,
                                                   uint32_t (&pairs)[kIntegerRows][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // In a word of codes a lane's k are 2 t, 2 t + 16, 2 t + 1 and 2 t + 17 of its 32, or 8 more; t is lane % 4.
  const int first = lane / 8 * 32 + lane / 4 % 2 * 8 + lane % 4 * 2;
#pragma unroll
  for (int row = 0; row < kIntegerRows; ++row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = row < rows && first + 16 * i < k;
      pairs[row][i] = exists ? *reinterpret_cast<const uint32_t*>(x + row * row_stride + first + 16 * i) : 0;
    }
  }
}

// By a warp: writes the integers of a chunk. Rows that are not there are not written: their sums, of whatever is in
// shared memory, are used by none.
template <typename T>
__device__ __forceinline__ void write_integer_chunk(const uint32_t (&pairs)[kIntegerRows][2], int rows, uint32_t to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
#pragma unroll
  for (int row = 0; row < kIntegerRows; ++row) {
    if (row >= rows) return;
    float elements[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      elements[i] = to_float(bit_cast<T>(static_cast<uint16_t>(pairs[row][i])));
      elements[2 + i] = to_float(bit_cast<T>(static_cast<uint16_t>(pairs[row][i] >> 16)));
    }
    int32_t integers[4];
    const float scale = to_integers(elements, integers);
    uint32_t words[4];
    to_digits(integers, words);
    int32_t sums[2];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      constexpr int kOnes = 0x01010101;
      const int upper = __dp4a(static_cast<int>(words[3 - 2 * pair]), kOnes, 0);
      sums[pair] =
          __reduce_add_sync(0xffffffffU, upper * 256 + __dp4a(static_cast<int>(words[2 - 2 * pair]), kOnes, 0));
    }
#pragma unroll
    for (int digit = 0; digit < 4; ++digit) {
      const int column = 4 * row + 3 - digit;
      store_shared_32(to + column * kPackedK + (lane / 4 ^ column) * 16 + t * 4, words[digit]);
    }
    if (lane == 0) {
      const float values[4] = {scale * 65536.0F, bit_cast<float>(sums[0]), scale, bit_cast<float>(sums[1])};
      store_shared(to + kIntegerDigitBytes + row * 16, values);
    }
  }
}

}  // namespace qwen_plugins
