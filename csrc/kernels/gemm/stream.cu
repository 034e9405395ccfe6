#include <algorithm>

#include "stream.h"
#include "stream_launch.cuh"

namespace qwen_plugins {
namespace {

// Bytes of shared memory of a block.
int64_t shared_bytes_of(StreamVariant variant, int64_t rows, int64_t in_features) {
  const bool few = rows <= 8;
  switch (variant) {
    case StreamVariant::kKeepsX:
      return few ? KeepsX8::shared_bytes(rows, in_features) : KeepsX16::shared_bytes(rows, in_features);
    case StreamVariant::kStreamsX:
      return few ? StreamsX8::shared_bytes(0, 0) : StreamsX16::shared_bytes(0, 0);
    case StreamVariant::kSmall:
      return few ? SmallX8::shared_bytes(0, 0) : SmallX16::shared_bytes(0, 0);
  }
  return 0;
}

// Beyond 8 or 16, the number of rows does not decide: where x is large, streaming it is as fast as keeping it.
StreamVariant choose_variant(const GemmShape& shape, const DeviceProperties& device) {
  const auto fits = [&](StreamVariant variant, int64_t rows) {
    return shared_bytes_of(variant, rows, shape.in_features) <= device.max_shared_memory_per_block;
  };
  if (fits(StreamVariant::kKeepsX, shape.rows <= 8 ? 8 : 16)) return StreamVariant::kKeepsX;
  if (fits(StreamVariant::kStreamsX, shape.rows)) return StreamVariant::kStreamsX;
  // With less shared memory than Hopper has.
  return fits(StreamVariant::kKeepsX, shape.rows) ? StreamVariant::kKeepsX : StreamVariant::kSmall;
}

bool takes_any_rows(const GemmParams& params) { return is_in_packs(params.shape) && is_aligned(params); }

bool takes(const GemmParams& params, const DeviceProperties& device, int32_t variant) {
  const GemmShape& shape = params.shape;
  if (shape.rows > kMaxStreamedRows || !takes_any_rows(params)) return false;
  return variant == kOwnVariant || shared_bytes_of(static_cast<StreamVariant>(variant), shape.rows,
                                                   shape.in_features) <= device.max_shared_memory_per_block;
}

cudaError_t launch(const GemmParams& params, const DeviceProperties& device, int32_t variant, cudaStream_t stream) {
  const StreamVariant chosen =
      variant == kOwnVariant ? choose_variant(params.shape, device) : static_cast<StreamVariant>(variant);
  return params.shape.dtype == DataType::kFloat16 ? launch_gemm_stream_float16(params, chosen, device, stream)
                                                  : launch_gemm_stream_bfloat16(params, chosen, device, stream);
}

cudaError_t launch_in_parts(const GemmParams& p, const DeviceProperties& device, int32_t, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t row = 0; row < p.shape.rows && error == cudaSuccess; row += kMaxStreamedRows) {
    error = launch(rows_of(p, row, std::min(kMaxStreamedRows, p.shape.rows - row)), device, kOwnVariant, stream);
  }
  return error;
}

}  // namespace

bool is_for_stream(const GemmShape& shape) { return is_in_packs(shape) && shape.rows <= kMaxStreamedRows; }

GemmKernel stream_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStream;
  kernel.name = "stream";
  kernel.variants = {{static_cast<int32_t>(StreamVariant::kKeepsX), "keeps_x"},
                     {static_cast<int32_t>(StreamVariant::kStreamsX), "streams_x"},
                     {static_cast<int32_t>(StreamVariant::kSmall), "small"}};
  kernel.takes = takes;
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = kernel.takes;
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch;
  return kernel;
}

GemmKernel stream_in_parts_kernel() {
  GemmKernel kernel{};
  kernel.id = GemmKernelId::kStreamInParts;
  kernel.name = "stream_in_parts";
  kernel.takes = [](const GemmParams& params, const DeviceProperties&, int32_t) { return takes_any_rows(params); };
  kernel.is_for = [](const GemmParams&, const DeviceProperties&) { return true; };
  kernel.is_candidate = [](const GemmParams&, const DeviceProperties&, int32_t) { return false; };
  kernel.workspace_bytes = no_workspace;
  kernel.launch = launch_in_parts;
  return kernel;
}

}  // namespace qwen_plugins
