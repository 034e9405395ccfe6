// What quantization to 8 bits computes with: magnitudes and correctly rounded quotients.
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

// Quotients by one divisor above 0, rounded correctly: a product with the reciprocal, and its remainder (Markstein,
// "Computation of elementary functions", 1990). Infinity stays infinity. Of a divisor that is not above 0 the quotients
// are those of zeros: 0 for finite values, else NaN.
class QuotientBy {
 public:
  __device__ __forceinline__ explicit QuotientBy(float divisor) {
    if (!(divisor > 0.0F)) return;
    factor_ = divisor < 0x1p-64F ? 0x1p64F : 1.0F;  // neither reciprocal nor remainder leaves the range
    divisor_ = divisor * factor_;
    reciprocal_ = __frcp_rn(divisor_);
  }
  __device__ __forceinline__ float operator()(float value) const {
    const float product = value * factor_ * reciprocal_;
    const float quotient = __fmaf_rn(__fmaf_rn(-product, divisor_, value * factor_), reciprocal_, product);
    return fabsf(product) <= FLT_MAX ? quotient : product;
  }

 private:
  float factor_ = 0.0F;
  float divisor_ = 0.0F;
  float reciprocal_ = 0.0F;
};

}  // namespace qwen_plugins
