#include "hopper_operands.h"

#include <array>

namespace qwen_plugins {
namespace {

constexpr cuuint32_t kChunkColumns = kHopperChunk;

decltype(&cuTensorMapEncodeTiled) load_describe() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

template <size_t kRank>
bool describe(CUtensorMap& tensor, DataType dtype, const void* data, const std::array<cuuint64_t, kRank>& sizes,
              const std::array<cuuint64_t, kRank - 1>& strides, const std::array<cuuint32_t, kRank>& box) {
  static const auto encode = load_describe();
  if (encode == nullptr) return false;
  std::array<cuuint32_t, kRank> steps;
  steps.fill(1);
  return encode(&tensor,
                dtype == DataType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank,
                const_cast<void*>(data), sizes.data(), strides.data(), box.data(), steps.data(),
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool is_for_hopper(const GemmParams& params, const DeviceProperties& device) {
  const GemmShape& shape = params.shape;
  const auto addresses = reinterpret_cast<uintptr_t>(params.x) | reinterpret_cast<uintptr_t>(params.weight) |
                         reinterpret_cast<uintptr_t>(params.y);
  return device.major == 9 && shape.dtype != DataType::kFloat32 && addresses % 16 == 0 && shape.in_features % 8 == 0 &&
         params.x_row_stride % 8 == 0 && columns_of(shape) % 8 == 0;
}

bool describe_weight(CUtensorMap& tensor, const GemmParams& params, int box_rows) {
  const GemmShape& shape = params.shape;
  const auto in_features = static_cast<cuuint64_t>(shape.in_features);
  const auto out_features = static_cast<cuuint64_t>(shape.out_features);
  const auto rows = static_cast<cuuint32_t>(box_rows);
  const cuuint64_t row_bytes = 2 * in_features;
  if (shape.activation == Activation::kSwiglu) {
    return describe<4>(tensor, shape.dtype, params.weight, {in_features, 8, 2, out_features / 16},
                       {row_bytes, row_bytes * (out_features / 2), row_bytes * 8}, {kChunkColumns, 8, 2, rows / 16});
  }
  const cuuint64_t all_bytes = row_bytes * out_features;
  return describe<4>(tensor, shape.dtype, params.weight, {in_features, out_features, 1, 1},
                     {row_bytes, all_bytes, all_bytes}, {kChunkColumns, rows, 1, 1});
}

bool describe_x(CUtensorMap& tensor, const GemmParams& params, int box_rows) {
  const GemmShape& shape = params.shape;
  return describe<2>(
      tensor, shape.dtype, params.x, {static_cast<cuuint64_t>(shape.in_features), static_cast<cuuint64_t>(shape.rows)},
      {static_cast<cuuint64_t>(2 * params.x_row_stride)}, {kChunkColumns, static_cast<cuuint32_t>(box_rows)});
}

ClusterLaunch::ClusterLaunch(int blocks, int cluster, int threads, size_t shared_bytes, cudaStream_t stream) {
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
}

cudaError_t count_clusters(const void* kernel, int cluster, int threads, size_t shared_bytes, int* clusters) {
  const ClusterLaunch launch(cluster, cluster, threads, shared_bytes, nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config);
  if (error != cudaErrorInvalidClusterSize) return error;
  cudaGetLastError();
  *clusters = 0;
  return cudaSuccess;
}

}  // namespace qwen_plugins
