// What quantization to 8 bits computes with: magnitudes and correctly rounded quotients.
#pragma once

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

// Quotients by one divisor above 0, of any size; by another 0 for finite values, else NaN.
class QuotientBy {
 public:
  __device__ __forceinline__ explicit QuotientBy(float divisor) {
    if (!(divisor > 0.0F)) return;
    factor_ = divisor < 0x1p-64F ? 0x1p64F : 1.0F;  // neither reciprocal nor remainder leaves the range
    divisor_ = divisor * factor_;
    reciprocal_ = __frcp_rn(divisor_);
  }
  __device__ __forceinline__ float operator()(float value) const {
    return quotient(value * factor_, divisor_, reciprocal_);
  }

 private:
  float factor_ = 0.0F;
  float divisor_ = 0.0F;
  float reciprocal_ = 0.0F;
};

}  // namespace qwen_plugins
