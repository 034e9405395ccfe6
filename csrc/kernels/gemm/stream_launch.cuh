// The choice of a gemm_stream kernel and its launch, for the files that compile them, one for each type.
#pragma once

#include <algorithm>

#include "kernels/common/launch.h"
#include "stream.cuh"

namespace qwen_plugins {

// With 8 or with 16 rows of x; where the multiprocessor has the memory, and elsewhere. Measured: docs/gemm.md.
using KeepsX8 = StreamShape<1, 2, XPlace::kShared, 16, 4>;
using StreamsX8 = StreamShape<1, 4, XPlace::kStreamed, 16, 2>;
using KeepsX16 = StreamShape<2, 1, XPlace::kShared, 16, 4>;
using StreamsX16 = StreamShape<2, 4, XPlace::kStreamed, 8, 3>;
using SmallX8 = StreamShape<1, 1, XPlace::kStreamed, 16, 2>;
using SmallX16 = StreamShape<2, 1, XPlace::kStreamed, 8, 3>;

// The columns that a block works on at a time, `most` or fewer: so few that it takes no more rounds, for the memory is
// busy until the block with the most is done. Whole requests of a warp, of 4 rows: with parts of them small products
// took 4 % longer.
inline int32_t even_group_columns(int32_t columns, int32_t most, int32_t multiprocessors) {
  constexpr int32_t kUnit = kTileRows / 2;
  const auto divide_up = [](int32_t value, int32_t by) { return (value + by - 1) / by; };
  const int32_t rounds = divide_up(columns, multiprocessors * most);
  return std::min(most, divide_up(columns, multiprocessors * rounds * kUnit) * kUnit);
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
  p.chunks = static_cast<int32_t>((shape.in_features + kChunk - 1) / kChunk);
  p.chunks_of_warp = (p.chunks + Shape::kWarps - 1) / Shape::kWarps;
  p.group_columns = even_group_columns(p.columns, Shape::kTiles * p.tile_columns, multiprocessors);
  p.groups = (p.columns + p.group_columns - 1) / p.group_columns;
  p.constant_weight = params.constant_weight;
  return p;
}

template <typename T, typename Shape>
cudaError_t launch_stream(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream) {
  const StreamArguments arguments = stream_arguments<Shape>(params, device.multiprocessors);
  // More than half of a multiprocessor's memory, so that two blocks never share one while another has none.
  const auto shared_bytes = std::max<int64_t>(Shape::shared_bytes(params.shape.rows, params.shape.in_features),
                                              device.max_shared_memory_per_block / 2 + 1024);
  auto* kernel = gemm_stream<T, Shape>;
  // Set at every launch: it costs less than to find out whether it has been, for this kernel and device.
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
cudaError_t launch_stream_of_type(const GemmParams& params, cudaStream_t stream) {
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  const GemmShape& shape = params.shape;
  // Which kernel does not depend on the number of rows otherwise: streaming x is as fast where it is large.
  const auto fits = [&](int64_t bytes) { return bytes <= device.max_shared_memory_per_block; };
  if (shape.rows <= 8) {
    if (fits(KeepsX8::shared_bytes(8, shape.in_features))) return launch_stream<T, KeepsX8>(params, device, stream);
    if (fits(StreamsX8::shared_bytes(0, 0))) return launch_stream<T, StreamsX8>(params, device, stream);
    if (fits(KeepsX8::shared_bytes(shape.rows, shape.in_features))) {
      return launch_stream<T, KeepsX8>(params, device, stream);  // less memory than Hopper's
    }
    return launch_stream<T, SmallX8>(params, device, stream);
  }
  if (fits(KeepsX16::shared_bytes(16, shape.in_features))) return launch_stream<T, KeepsX16>(params, device, stream);
  if (fits(StreamsX16::shared_bytes(0, 0))) return launch_stream<T, StreamsX16>(params, device, stream);
  if (fits(KeepsX16::shared_bytes(shape.rows, shape.in_features))) {
    return launch_stream<T, KeepsX16>(params, device, stream);
  }
  return launch_stream<T, SmallX16>(params, device, stream);
}

}  // namespace qwen_plugins
