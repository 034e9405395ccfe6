// What quantization to 8 bits computes with: magnitudes, correctly rounded quotients, and reciprocals.
#pragma once

#include <cfloat>

#include "elements.cuh"

namespace qwen_plugins {

// The larger magnitude; NaN if one of them is.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(fabsf(a)), "f"(fabsf(b)));
  return result;
}

// value / divisor, rounded correctly unless something leaves the range: the product with the reciprocal, and its
// remainder (Markstein, "Computation of elementary functions", 1990).
__device__ __forceinline__ float quotient(float value, float divisor, float reciprocal) {
  const float product = value * reciprocal;
  return __fmaf_rn(__fmaf_rn(-product, divisor, value), reciprocal, product);
}

// Quotients by one finite divisor above 0, rounded correctly from 2^-20 on; by another 0 for finite values, else NaN.
class QuotientBy {
 public:
  __device__ __forceinline__ explicit QuotientBy(float divisor) {
    if (!(divisor > 0.0F && divisor <= FLT_MAX)) return;
    // Neither reciprocal nor remainder leaves the range.
    factor_ = divisor < 0x1p-64F ? 0x1p64F : divisor > 0x1p64F ? 0x1p-64F : 1.0F;
    divisor_ = divisor * factor_;
    reciprocal_ = __frcp_rn(divisor_);
  }
  // Of values that are at most 2^20 times the divisor.
  __device__ __forceinline__ float operator()(float value) const {
    return quotient(value * factor_, divisor_, reciprocal_);
  }
  // Of all values; a quotient of more than 2^20 is not exact, and may be infinite.
  __device__ __forceinline__ float of_any(float value) const {
    const float scaled = value * factor_;
    const float product = scaled * reciprocal_;  // of which infinity would become NaN
    return fabsf(product) <= 0x1p20F ? quotient(scaled, divisor_, reciprocal_) : product;
  }

 private:
  float factor_ = 0.0F;
  float divisor_ = 0.0F;
  float reciprocal_ = 0.0F;
};

// 1 / scale, at most the largest float32: that of a tiny scale, too, leaves zeros what they are. NaN stays.
__device__ __forceinline__ float finite_reciprocal(float scale) {
  const float reciprocal = __frcp_rn(scale);
  return reciprocal > FLT_MAX ? FLT_MAX : reciprocal;
}

}  // namespace qwen_plugins
