#include "tensor_map.h"

#include <cuda_runtime_api.h>

namespace qwen_plugins {
namespace {

// Finds the driver's function at run time: a library linked with libcuda would not load where there is no driver.
decltype(&cuTensorMapEncodeTiled) find_encode_tiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

bool encode(CUtensorMap& tensor_map, CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const void* data,
            std::initializer_list<cuuint64_t> sizes, std::initializer_list<cuuint64_t> strides,
            std::initializer_list<cuuint32_t> box) {
  constexpr cuuint32_t kElementStrides[] = {1, 1, 1, 1, 1};  // of up to five dimensions
  static const auto encode_tiled = find_encode_tiled();
  if (encode_tiled == nullptr) return false;
  return encode_tiled(&tensor_map, type, static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data), sizes.begin(),
                      strides.begin(), box.begin(), kElementStrides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool encode_tensor_map(CUtensorMap& tensor_map, DataType dtype, const void* data,
                       std::initializer_list<cuuint64_t> sizes, std::initializer_list<cuuint64_t> strides,
                       std::initializer_list<cuuint32_t> box) {
  const CUtensorMapDataType type =
      dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(tensor_map, type, CU_TENSOR_MAP_SWIZZLE_128B, data, sizes, strides, box);
}

bool encode_store_tensor_map(CUtensorMap& tensor_map, void* data, std::initializer_list<cuuint64_t> sizes,
                             std::initializer_list<cuuint64_t> strides, std::initializer_list<cuuint32_t> box) {
  const cuuint32_t elements = *box.begin();
  const CUtensorMapSwizzle swizzle = elements == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : elements == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                      : CU_TENSOR_MAP_SWIZZLE_32B;
  return encode(tensor_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, swizzle, data, sizes, strides, box);
}

}  // namespace qwen_plugins
