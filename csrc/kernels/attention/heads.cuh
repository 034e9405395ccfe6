// What heads.h describes, in device code.
#pragma once

#include "heads.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/quotient.cuh"

namespace qwen_plugins {

// Distances in the cache, in bytes. Without a page table the pages of a sequence follow each other in its row, so that
// both kinds of cache are read in the same way.
struct CacheLayout {
  int64_t block;       // from a head to the next
  int64_t value;       // from a key, or its scale, to the value
  int64_t row;         // from a row to the next
  int64_t page;        // from a page to the next
  int64_t scale_page;  // from the scales of a page to those of the next
};

// The number of a sequence's page that has a position; without a page table, its place in the sequence.
__device__ __forceinline__ int page_of(const KvCache& cache, int sequence, int position) {
  const int index = static_cast<unsigned>(position) / kPageSize;
  return cache.pages == nullptr ? index : cache.pages[sequence * int64_t{cache.pages_row_stride} + index];
}

// Keys and values of one sequence and key-value head in the cache, by pages of kPageSize positions. `layout` must
// outlive it: where a kernel has it as a parameter, it takes no registers.
template <int kTokenBytes, bool kQuantized>
class HeadCache {
 public:
  static __host__ __device__ __forceinline__ CacheLayout layout_of(const AttentionHeads& heads, const KvCache& cache) {
    CacheLayout layout{};
    layout.block = cache.max_positions * int64_t{kTokenBytes + (kQuantized ? 4 : 0)};
    layout.value = heads.num_kv_heads * layout.block;
    layout.row = 2 * layout.value;
    layout.page = cache.pages == nullptr ? kPageSize * kTokenBytes : layout.row;
    layout.scale_page = cache.pages == nullptr ? kPageSize * 4 : layout.row;
    return layout;
  }

  __device__ __forceinline__ HeadCache(const KvCache& cache, const CacheLayout& layout, int sequence, int kv_head)
      : layout_(layout), keys_(static_cast<char*>(cache.data) + kv_head * layout.block) {
    if (cache.pages == nullptr) keys_ += sequence * layout.row;
    if constexpr (kQuantized) scales_ = cache.max_positions * kTokenBytes;
  }

  // The key at a position, which is in page `page`; those behind it in the page follow.
  __device__ __forceinline__ char* key(int page, int position) const {
    return keys_ + page * layout_.page + static_cast<unsigned>(position) % kPageSize * kTokenBytes;
  }
  __device__ __forceinline__ float* key_scale(int page, int position) const {
    static_assert(kQuantized);
    char* const scales = keys_ + scales_ + page * layout_.scale_page;
    return reinterpret_cast<float*>(scales) + static_cast<unsigned>(position) % kPageSize;
  }
  // From a key to the value, and likewise between their scales.
  __device__ __forceinline__ int64_t value_bytes() const { return layout_.value; }
  __device__ __forceinline__ float* value_scale(int page, int position) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(key_scale(page, position)) + layout_.value);
  }
  // What the bytes before a position of a page, kTokenBytes for each, are added to.
  __device__ __forceinline__ const char* row(int page, int position) const {
    const int index = static_cast<unsigned>(position) / kPageSize;
    return keys_ + page * layout_.page - int64_t{index} * (kPageSize * kTokenBytes);
  }

 private:
  const CacheLayout& layout_;
  char* keys_;      // of page 0
  int scales_ = 0;  // from the keys of a page to their scales, for page 0
};

// Of a cache of T, or of 8-bit codes.
template <typename T, int kHeadSize, bool kQuantized>
using HeadCacheOf = HeadCache<kHeadSize*(kQuantized ? 1 : static_cast<int>(sizeof(T))), kQuantized>;

// The neighbouring elements that one lane loads of a head, of q, k or v or of the cache.
constexpr int kVecSize = 8;
template <typename T>
struct Vector {
  FullPack packs[kVecSize / kVec<T>];
};

template <typename T>
__device__ __forceinline__ void to_floats(float (&out)[kVecSize], const Vector<T>& vector) {
#pragma unroll
  for (int i = 0; i < kVecSize / kVec<T>; ++i) {
    float part[kVec<T>];
    unpack<T>(part, vector.packs[i]);
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) out[i * kVec<T> + j] = part[j];
  }
}
template <typename T>
__device__ __forceinline__ Vector<T> from_floats(const float (&values)[kVecSize]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < kVecSize / kVec<T>; ++i) {
    float part[kVec<T>];
#pragma unroll
    for (int j = 0; j < kVec<T>; ++j) part[j] = values[i * kVec<T> + j];
    vector.packs[i] = pack<T>(part);
  }
  return vector;
}

// Lanes that hold a head together, a power of two; those beyond the end of the head are idle.
template <int kHeadSize>
constexpr int kHeadLanes = kHeadSize <= 32    ? 4
                           : kHeadSize <= 64  ? 8
                           : kHeadSize <= 128 ? 16
                                              : 32;

constexpr float kLog2E = 1.44269504F;  // a factor of scores: the softmax is computed with exp2
// Smaller than any score, yet finite: the difference of two of them is 0 and not NaN.
constexpr float kLowestScore = -1e30F;

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffU, value, offset);
  return value;
}

// The scale of a token and head in a cache of 8 bits, from its largest magnitude.
__device__ __forceinline__ float cache_scale(float largest, CacheDataType dtype) {
  return __fdiv_rn(largest, dtype == CacheDataType::kInt8 ? 127.0F : 448.0F);
}
// The codes of elements with one scale, in the lowest bits; 0 where the scale is 0 or NaN.
class CodeOf {
 public:
  __device__ __forceinline__ CodeOf(float scale, CacheDataType dtype) : dtype_(dtype), quotient_(scale) {}
  __device__ __forceinline__ uint32_t operator()(float value) const {
    const float quotient = quotient_(value);
    return dtype_ == CacheDataType::kInt8 ? to_int8_bits(quotient) & 0xffU : to_float8_e4m3_bits(quotient);
  }

 private:
  CacheDataType dtype_;
  QuotientBy quotient_;
};

// The codes of a context's elements, which have been multiplied by the reciprocal of its scale: 1, 2 or 4 neighbours,
// whose address is a multiple of their number.
template <int kCount>
__device__ __forceinline__ void store_context_codes(void* to, const float (&scaled)[kCount], DataType dtype) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t code = dtype == DataType::kInt8 ? to_int8_bits(scaled[i]) & 0xffU : to_float8_e4m3_bits(scaled[i]);
    codes |= code << 8 * i;
  }
  if constexpr (kCount == 1) *static_cast<uint8_t*>(to) = static_cast<uint8_t>(codes);
  if constexpr (kCount == 2) *static_cast<uint16_t*>(to) = static_cast<uint16_t>(codes);
  if constexpr (kCount == 4) *static_cast<uint32_t*>(to) = codes;
}

// The float16 values of four codes, which float16 represents exactly: two in each of two registers.
template <CacheDataType kType>
__device__ __forceinline__ void codes_to_float16(uint32_t (&values)[2], uint32_t codes) {
  if constexpr (kType == CacheDataType::kInt8) {
    // 1024 + u has the bits of u = code + 128 in the lowest byte.
    codes ^= 0x80808080U;
    const __half2 offset = bit_cast<__half2>(0x64806480U);
    values[0] = bit_cast<uint32_t>(__hsub2(bit_cast<__half2>(__byte_perm(codes, 0x64646464U, 0x4140)), offset));
    values[1] = bit_cast<uint32_t>(__hsub2(bit_cast<__half2>(__byte_perm(codes, 0x64646464U, 0x4342)), offset));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(values[0]), "=r"(values[1])
        : "r"(codes));
#else
    // Sign, exponent and mantissa in their places give the value / 256, also of subnormals.
    const __half2 factor = bit_cast<__half2>(0x5c005c00U);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t upper = __byte_perm(codes, 0, i == 0 ? 0x1404 : 0x3424);
      const uint32_t bits = (upper & 0x80008000U) | (upper & 0x7f007f00U) >> 1;
      values[i] = bit_cast<uint32_t>(__hmul2(bit_cast<__half2>(bits), factor));
    }
#endif
  }
}
__device__ __forceinline__ void codes_to_floats(float (&values)[4], uint32_t codes, CacheDataType dtype) {
  uint32_t pairs[2];
  if (dtype == CacheDataType::kInt8) {
    codes_to_float16<CacheDataType::kInt8>(pairs, codes);
  } else {
    codes_to_float16<CacheDataType::kFloat8E4M3>(pairs, codes);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float2 pair = __half22float2(bit_cast<__half2>(pairs[i]));
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// The two elements that the rotary embedding rotates together, in either style.
struct RotaryPair {
  int index;    // of the pair's cosine and sine
  int partner;  // the other element
  float sign;   // with which the other element times the sine is added

  __device__ __forceinline__ RotaryPair(RotaryStyle style, int element, int rotary_dim) {
    const int half = rotary_dim / 2;
    const bool neox = style == RotaryStyle::kNeox;
    const bool first = neox ? element < half : element % 2 == 0;
    const int distance = neox ? half : 1;
    partner = first ? element + distance : element - distance;
    index = neox ? min(element, partner) : element / 2;
    sign = first ? -1.0F : 1.0F;
  }
};

// One warp prepares one head of q or k for attention: normalises, rotates and scales it, and writes it to `out`
// [kHeadSize] in shared memory, as float32 values that T can represent. `norm_weight` may be null; `cos_sin` is the
// token's row of the rotary table. All loads are issued before the first of them is used.
template <typename T, int kHeadSize>
__device__ __forceinline__ void prepare_head(float* out, const T* x, const T* norm_weight, const AttentionHeads& heads,
                                             const float* cos_sin, float scale) {
  constexpr int kPerLane = (kHeadSize + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float values[kPerLane];
  float weights[kPerLane] = {};
  float cosines[kPerLane] = {};
  float sines[kPerLane] = {};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    values[i] = d < kHeadSize ? to_float(x[d]) : 0.0F;
    if (norm_weight != nullptr && d < kHeadSize) weights[i] = to_float(norm_weight[d]);
    if (d < heads.rotary_dim) {
      const RotaryPair pair(heads.rotary_style, d, heads.rotary_dim);
      cosines[i] = cos_sin[pair.index];
      sines[i] = cos_sin[heads.rotary_dim / 2 + pair.index];
    }
  }
  if (norm_weight != nullptr) {
    float sum_of_squares = 0.0F;
#pragma unroll
    for (const float value : values) sum_of_squares += value * value;
    const float factor = rsqrtf(sum_over_warp(sum_of_squares) / kHeadSize + heads.norm_eps);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = to_float(from_float<T>(values[i] * factor * weights[i]));
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) out[lane + 32 * i] = values[i];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    if (d < heads.rotary_dim) {
      const RotaryPair pair(heads.rotary_style, d, heads.rotary_dim);
      values[i] = values[i] * cosines[i] + pair.sign * out[pair.partner] * sines[i];
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) out[lane + 32 * i] = to_float(from_float<T>(values[i] * scale));
  }
  __syncwarp();
}

// The row of a sequence's first position in the rotary table.
__device__ __forceinline__ int rotary_offset(const AttentionHeads& heads, int sequence) {
  return heads.rotary_offsets == nullptr ? 0 : heads.rotary_offsets[sequence];
}
// The factor of q at a row of the rotary table.
__device__ __forceinline__ float query_factor(const AttentionHeads& heads, int row) {
  return heads.query_scale == nullptr ? 1.0F : heads.query_scale[row];
}

// The host's checks of what is written in heads.h.
inline bool is_valid(const AttentionHeads& heads, const KvCache& cache) {
  const bool sizes = heads.num_kv_heads > 0 && heads.num_heads > 0 && heads.num_heads <= kMaxHeads &&
                     heads.num_heads % heads.num_kv_heads == 0 && heads.rotary_dim >= 0 && heads.rotary_dim % 2 == 0 &&
                     heads.rotary_dim <= heads.head_size;
  const bool table = heads.rotary_dim == 0 || heads.rotary_table != nullptr;
  const bool style = heads.rotary_style == RotaryStyle::kNeox || heads.rotary_style == RotaryStyle::kGptJ;
  const bool norms = (heads.q_norm_weight == nullptr) == (heads.k_norm_weight == nullptr);
  const bool types = cache.dtype == CacheDataType::kSame ||
                     ((cache.dtype == CacheDataType::kInt8 || cache.dtype == CacheDataType::kFloat8E4M3) &&
                      cache.max_positions % kPageSize == 0);
  const bool pages = cache.pages == nullptr || (cache.max_positions == kPageSize && cache.pages_row_stride > 0);
  return sizes && table && style && norms && types && pages && cache.data != nullptr && cache.max_positions > 0 &&
         reinterpret_cast<uintptr_t>(cache.data) % sizeof(FullPack) == 0;
}

// Calls `launch(T{}, std::integral_constant<int, head_size>{})` for the element type and the head size of `heads`.
template <int kIndex = 0, typename Launch>
cudaError_t with_type_and_head_size(const AttentionHeads& heads, const Launch& launch) {
  if constexpr (kIndex == kHeadSizes.size()) {
    return cudaErrorInvalidValue;
  } else {
    if (heads.head_size != kHeadSizes[kIndex]) return with_type_and_head_size<kIndex + 1>(heads, launch);
    return with_type(heads.dtype,
                     [&](auto zero) { return launch(zero, std::integral_constant<int, kHeadSizes[kIndex]>{}); });
  }
}

}  // namespace qwen_plugins
