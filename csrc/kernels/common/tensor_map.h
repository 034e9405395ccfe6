// Tensor maps (CUtensorMap), which describe a tensor in global memory to TMA (Hopper and later).
#pragma once

#include <cuda.h>

#include <initializer_list>

#include "data_type.h"

namespace qwen_plugins {

// Encodes a tensor map of kFloat16 or kBFloat16 elements for loads of boxes in the 128-byte swizzle (wgmma.cuh). The
// first dimension is contiguous, and a box has 64 elements of it; `strides` are those of the other dimensions, in
// bytes, which must be multiples of 16, as must the address `data`.
//
// Returns false where the driver cannot encode the tensor map. The device's context must be current in the calling
// thread: any call of the CUDA runtime but cudaGetDevice makes it so.
bool encode_tensor_map(CUtensorMap& tensor_map, DataType dtype, const void* data,
                       std::initializer_list<cuuint64_t> sizes, std::initializer_list<cuuint64_t> strides,
                       std::initializer_list<cuuint32_t> box);

// Likewise for stores, in the swizzle of a box's row, which has 16, 32 or 64 elements.
bool encode_store_tensor_map(CUtensorMap& tensor_map, void* data, std::initializer_list<cuuint64_t> sizes,
                             std::initializer_list<cuuint64_t> strides, std::initializer_list<cuuint32_t> box);

}  // namespace qwen_plugins
