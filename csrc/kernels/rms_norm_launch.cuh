// Chooses a kernel for one element type and launches it. rms_norm_float16.cu and its siblings instantiate this, so that
// the types compile in parallel.
#pragma once

#include <algorithm>

#include "launch.h"
#include "rms_norm_kernels.cuh"

namespace qwen_plugins {

// A launch: the arguments of the kernels and what chooses among them. Rows are counted by blockIdx.x within `groups`
// groups counted by blockIdx.y.
struct RmsNormPlan {
  RmsNormArguments arguments;
  int64_t hidden_size;
  uint32_t groups;
  Output output;
  bool residual;
  bool packed;  // every row starts at, and consists of, whole packs
  WeightMode weight_mode;
};

template <typename T>
cudaError_t launch_rms_norm_of_type(const RmsNormPlan& plan, cudaStream_t stream);

// The shape of a block that holds its row in registers. A thread holds 1, 2 or 4 packs.
struct RegisterShape {
  int packs_per_thread;
  int threads;
};

constexpr int kMaxPacksInRegisters = 4 * 1024;

inline int threads_for(int row_packs, int packs_per_thread) {
  return (row_packs + packs_per_thread * 32 - 1) / (packs_per_thread * 32) * 32;
}

// Measured on an H200 (docs/rms_norm.md). As long as all rows are on the chip at once, more threads a row are faster;
// with more rows than that, fewer threads with more loads in flight each.
inline RegisterShape choose_register_shape(int row_packs, int64_t rows, const DeviceProperties& device) {
  const int64_t resident_threads = static_cast<int64_t>(device.multiprocessors) * 2048;
  for (const int packs : {1, 2}) {
    const int threads = threads_for(row_packs, packs);
    if (threads <= 512 && rows * threads <= resident_threads) return {packs, threads};
  }
  if (row_packs <= 256) return {2, threads_for(row_packs, 2)};
  return {4, threads_for(row_packs, 4)};
}

template <typename T, bool kResidual, Output kOutput, WeightMode kWeightMode>
cudaError_t launch_in_registers(const RmsNormPlan& plan, const DeviceProperties& device, cudaStream_t stream) {
  const RmsNormArguments& p = plan.arguments;
  const auto launch = [&](auto* kernel, uint32_t blocks, dim3 threads) {
    return launch_kernel(kernel, dim3(blocks, plan.groups), threads, 0, device, stream, p);
  };
  if (p.length <= 32) {
    unsigned lanes = 1;
    while (lanes < static_cast<unsigned>(p.length)) lanes *= 2;
    const unsigned rows_per_block = std::min(128 / lanes, std::max(1U, p.rows_in_group));
    const uint32_t blocks = (p.rows_in_group + rows_per_block - 1) / rows_per_block;
    return launch(rms_norm_row_in_registers<T, 1, 32, kResidual, kOutput, kWeightMode>, blocks,
                  dim3(lanes, rows_per_block));
  }
  const int64_t rows = static_cast<int64_t>(p.rows_in_group) * plan.groups;
  const auto [packs, threads] = choose_register_shape(p.length, rows, device);
  const uint32_t blocks = p.rows_in_group;
  if (packs == 1) {
    return launch(rms_norm_row_in_registers<T, 1, 512, kResidual, kOutput, kWeightMode>, blocks, dim3(threads));
  }
  if (packs == 2 && threads <= 256) {
    return launch(rms_norm_row_in_registers<T, 2, 256, kResidual, kOutput, kWeightMode>, blocks, dim3(threads));
  }
  if (packs == 2) {
    return launch(rms_norm_row_in_registers<T, 2, 512, kResidual, kOutput, kWeightMode>, blocks, dim3(threads));
  }
  if (threads <= 256) {
    return launch(rms_norm_row_in_registers<T, 4, 256, kResidual, kOutput, kWeightMode>, blocks, dim3(threads));
  }
  return launch(rms_norm_row_in_registers<T, 4, 1024, kResidual, kOutput, kWeightMode>, blocks, dim3(threads));
}

template <typename T, bool kPacked, Output kOutput>
cudaError_t launch_long_row(RmsNormPlan plan, const DeviceProperties& device, cudaStream_t stream) {
  const auto kernel = rms_norm_long_row<T, kPacked, kOutput>;
  const int64_t row_bytes = plan.hidden_size * static_cast<int64_t>(sizeof(T));
  size_t shared_bytes = 0;
  if (row_bytes + 1024 <= device.max_shared_memory_per_block) {  // the reduction has its own, small and static
    plan.arguments.options |= kCacheRow;
    shared_bytes = static_cast<size_t>(row_bytes);
  }
  if (shared_bytes > 48 * 1024 - 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // About four groups of elements a thread; a row of one element has a warp.
  const int threads = std::min(1024, threads_for(plan.arguments.length, 4));
  return launch_kernel(kernel, dim3(plan.arguments.rows_in_group, plan.groups), dim3(threads), shared_bytes, device,
                       stream, plan.arguments);
}

template <typename T, Output kOutput>
cudaError_t launch_with_output(RmsNormPlan plan, const DeviceProperties& device, cudaStream_t stream) {
  const int64_t row_packs = plan.hidden_size / kVec<T>;
  if (!plan.packed || row_packs > kMaxPacksInRegisters) {
    plan.arguments.length = static_cast<int32_t>(plan.packed ? row_packs : plan.hidden_size);
    return plan.packed ? launch_long_row<T, true, kOutput>(plan, device, stream)
                       : launch_long_row<T, false, kOutput>(plan, device, stream);
  }
  plan.arguments.length = static_cast<int32_t>(row_packs);
  const bool general = plan.weight_mode == WeightMode::kGeneral;
  if (plan.residual) {
    return general ? launch_in_registers<T, true, kOutput, WeightMode::kGeneral>(plan, device, stream)
                   : launch_in_registers<T, true, kOutput, WeightMode::kPlain>(plan, device, stream);
  }
  return general ? launch_in_registers<T, false, kOutput, WeightMode::kGeneral>(plan, device, stream)
                 : launch_in_registers<T, false, kOutput, WeightMode::kPlain>(plan, device, stream);
}

template <typename T>
cudaError_t launch_rms_norm_of_type(const RmsNormPlan& plan, cudaStream_t stream) {
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  switch (plan.output) {
    case Output::kSameType:
      return launch_with_output<T, Output::kSameType>(plan, device, stream);
    case Output::kInt8:
      return launch_with_output<T, Output::kInt8>(plan, device, stream);
    case Output::kFloat8E4M3:
      return launch_with_output<T, Output::kFloat8E4M3>(plan, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace qwen_plugins
