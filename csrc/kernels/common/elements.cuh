// Element types: dispatch on the host; in kernels, packs of 16 bytes and conversions to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "data_type.h"

namespace qwen_plugins {

// Calls `launch(T{})` with the floating-point element type T that `dtype` names; cudaErrorInvalidValue for other types.
template <typename Launch>
cudaError_t with_type(DataType dtype, const Launch& launch) {
  switch (dtype) {
    case DataType::kFloat32:
      return launch(float{});
    case DataType::kFloat16:
      return launch(__half{});
    case DataType::kBFloat16:
      return launch(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename To, typename From>
__device__ __forceinline__ To bit_cast(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(value);
  if constexpr (std::is_same_v<T, float>) return value;
}

// The elements of type T in one 32-bit register.
template <typename T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

// kWords registers that are loaded or stored with one instruction. Elements stay packed in words: with arrays of 16-bit
// elements the compiler rearranges halves of registers right after the load, and so waits for the load.
template <int kWords>
struct alignas(4 * kWords) Pack {
  uint32_t words[kWords];
};
using FullPack = Pack<4>;

// Elements of T in a full pack, 16 bytes: the widest access of one thread.
template <typename T>
constexpr int kVec = 4 * kPerWord<T>;

template <typename T>
__device__ __forceinline__ void unpack(float (&out)[kVec<T>], const FullPack& pack) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      out[i] = bit_cast<float>(pack.words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(bit_cast<__half2>(pack.words[i]));
      out[2 * i] = pair.x;
      out[2 * i + 1] = pair.y;
    } else {
      // A bfloat16 is the upper half of the float32 of the same value.
      out[2 * i] = bit_cast<float>(pack.words[i] << 16);
      out[2 * i + 1] = bit_cast<float>(pack.words[i] & 0xffff0000U);
    }
  }
}

template <typename T>
__device__ __forceinline__ FullPack pack(const float (&values)[kVec<T>]) {
  FullPack result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      result.words[i] = bit_cast<uint32_t>(values[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      result.words[i] = bit_cast<uint32_t>(__floats2half2_rn(values[2 * i], values[2 * i + 1]));
    } else {
      result.words[i] = bit_cast<uint32_t>(__floats2bfloat162_rn(values[2 * i], values[2 * i + 1]));
    }
  }
  return result;
}

// Loads kVec<T> elements of a weight, which is stored as T or as float32; `index` counts groups of kVec<T>.
template <typename T>
__device__ __forceinline__ void load_as_float(float (&out)[kVec<T>], const void* base, int64_t index, bool is_float32) {
  if (!is_float32) {
    unpack<T>(out, static_cast<const FullPack*>(base)[index]);
    return;
  }
  constexpr int kParts = kVec<T> / 4;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const FullPack loaded = static_cast<const FullPack*>(base)[index * kParts + part];
#pragma unroll
    for (int i = 0; i < 4; ++i) out[4 * part + i] = bit_cast<float>(loaded.words[i]);
  }
}

// Conversions to int8 and float8 round to nearest even and saturate. NaN becomes 0 as an int8 and stays NaN as a
// float8.
__device__ __forceinline__ uint32_t to_int8_bits(float value) {
  uint32_t result;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ uint32_t to_int8x4(const float (&v)[4]) {
  const uint32_t low = __byte_perm(to_int8_bits(v[0]), to_int8_bits(v[1]), 0x0040);
  const uint32_t high = __byte_perm(to_int8_bits(v[2]), to_int8_bits(v[3]), 0x0040);
  return __byte_perm(low, high, 0x5410);
}
__device__ __forceinline__ uint32_t to_float8_e4m3_bits(float value) {
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t to_float8_e4m3x4(const float (&v)[4]) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(v[0], v[1]), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(v[2], v[3]), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Access to groups of kWidth elements, full packs or single elements, of a row. `index` counts groups.
template <typename T, int kWidth>
struct Span {
  static_assert(kWidth == 1 || kWidth == kVec<T>);

  static __device__ __forceinline__ void load(float (&out)[kWidth], const T* row, int64_t index) {
    if constexpr (kWidth == 1) {
      out[0] = to_float(row[index]);
    } else {
      unpack<T>(out, reinterpret_cast<const FullPack*>(row)[index]);
    }
  }
  static __device__ __forceinline__ void load_either(float (&out)[kWidth], const void* base, int64_t index,
                                                     bool is_float32) {
    if constexpr (kWidth == 1) {
      out[0] = is_float32 ? static_cast<const float*>(base)[index] : to_float(static_cast<const T*>(base)[index]);
    } else {
      load_as_float<T>(out, base, index, is_float32);
    }
  }
  static __device__ __forceinline__ void store(T* row, int64_t index, const float (&values)[kWidth]) {
    if constexpr (kWidth == 1) {
      row[index] = from_float<T>(values[0]);
    } else {
      reinterpret_cast<FullPack*>(row)[index] = pack<T>(values);
    }
  }
};

}  // namespace qwen_plugins
