// The sizes of the gemm_stream kernels and their launch, which one file for each type compiles.
#pragma once

#include <algorithm>

#include "kernels/common/launch.h"
#include "stream.cuh"

namespace qwen_plugins {

// For up to 8 and up to 16 rows of x; the Small ones for multiprocessors with too little shared memory for the others.
// Measured: docs/gemm.md.
using KeepsX8 = StreamShape<1, 2, XPlace::kShared, 16, 4>;
using StreamsX8 = StreamShape<1, 4, XPlace::kStreamed, 16, 2>;
using KeepsX16 = StreamShape<2, 1, XPlace::kShared, 16, 4>;
using StreamsX16 = StreamShape<2, 4, XPlace::kStreamed, 8, 3>;
using SmallX8 = StreamShape<1, 1, XPlace::kStreamed, 16, 2>;
using SmallX16 = StreamShape<2, 1, XPlace::kStreamed, 8, 3>;

// The columns that a block computes at a time: as few as the number of waves allows, and at most `most`, so that no
// block has much more to read than the others. A multiple of 4, the rows of one load of a warp: with fewer rows to a
// load small GEMMs took 4 % longer.
inline int32_t even_group_columns(int32_t columns, int32_t most, int32_t multiprocessors) {
  constexpr int32_t kUnit = kTileRows / 2;
  const int32_t waves = divide_up(columns, multiprocessors * most);
  return std::min(most, divide_up(columns, multiprocessors * waves * kUnit) * kUnit);
}

template <typename Shape>
StreamArguments stream_arguments(const GemmParams& params, int32_t multiprocessors) {
  const GemmShape& shape = params.shape;
  StreamArguments p{};
  p.weight = params.weight;
  p.x = params.x;
  p.bias = params.bias;
  p.y = params.y;
  p.x_row_stride = params.x_row_stride;
  p.swiglu = shape.activation == Activation::kSwiglu;
  p.columns = static_cast<int32_t>(columns_of(shape));
  p.half_columns = p.swiglu ? 0 : kTileRows / 2;
  p.half_stride = (p.swiglu ? p.columns : kTileRows / 2) * shape.in_features;
  p.half_bias = p.swiglu ? p.columns : 0;
  p.tile_columns = p.swiglu ? kTileRows / 2 : kTileRows;
  p.tile_stride = p.tile_columns * shape.in_features;
  p.rows = static_cast<int32_t>(shape.rows);
  p.in_features = static_cast<int32_t>(shape.in_features);
  p.chunks = static_cast<int32_t>(divide_up(shape.in_features, kChunk));
  p.chunks_of_warp = divide_up(p.chunks, Shape::kWarps);
  p.group_columns = even_group_columns(p.columns, Shape::kTiles * p.tile_columns, multiprocessors);
  p.groups = divide_up(p.columns, p.group_columns);
  p.constant_weight = params.constant_weight;
  return p;
}

template <typename T, typename Shape>
cudaError_t launch_stream(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  const StreamArguments arguments = stream_arguments<Shape>(params, device.multiprocessors);
  // More than half of a multiprocessor's shared memory, so that two blocks never share one while another has none.
  const auto shared_bytes = std::max<int64_t>(Shape::shared_bytes(params.shape.rows, params.shape.in_features),
                                              device.max_shared_memory_per_block / 2 + 1024);
  auto* kernel = gemm_stream<T, Shape>;
  // Set at every launch: to find out whether it has been set for this kernel and device would cost more.
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
      error != cudaSuccess) {
    return error;
  }
  const int blocks = std::min(device.multiprocessors, arguments.groups);
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads),
                       static_cast<size_t>(shared_bytes), device, stream, arguments);
}

template <typename T>
cudaError_t launch_stream_variant(const GemmParams& params, StreamVariant variant, const DeviceProperties& device,
                                  cudaStream_t stream) {
  const bool few = params.shape.rows <= 8;
  switch (variant) {
    case StreamVariant::kKeepsX:
      return few ? launch_stream<T, KeepsX8>(params, device, stream)
                 : launch_stream<T, KeepsX16>(params, device, stream);
    case StreamVariant::kStreamsX:
      return few ? launch_stream<T, StreamsX8>(params, device, stream)
                 : launch_stream<T, StreamsX16>(params, device, stream);
    case StreamVariant::kSmall:
      return few ? launch_stream<T, SmallX8>(params, device, stream)
                 : launch_stream<T, SmallX16>(params, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qwen_plugins
