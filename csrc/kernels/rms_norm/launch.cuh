// Chooses a kernel for one element type and launches it. float16.cu and its siblings instantiate this, so that the
// types compile in parallel.
#pragma once

#include <algorithm>

#include "kernels.cuh"
#include "kernels/common/arithmetic.h"
#include "kernels/common/launch.h"

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
  bool batch_invariant;
};

template <typename T>
cudaError_t launch_rms_norm_of_type(const RmsNormPlan& plan, cudaStream_t stream);

// The shape of a block that holds its row in registers. A thread holds 1, 2 or 4 packs.
struct RegisterShape {
  int packs_per_thread;
  int threads;
};

constexpr int kMaxPacksInRegisters = 4 * 1024;

inline int threads_for(int row_packs, int packs_per_thread) { return divide_up(row_packs, packs_per_thread * 32) * 32; }

// Whether the blocks of all rows, one each, are resident on the device at the same time.
template <typename T>
bool all_resident(int64_t rows, int packs_per_thread, int threads, bool residual, const DeviceProperties& device) {
  const int registers = registers_for<T>(packs_per_thread, 1024, residual, WeightMode::kPlain);
  const int64_t threads_of_multiprocessor =
      std::min(device.threads_per_multiprocessor, kRegistersOfMultiprocessor / registers);
  const int64_t rows_a_multiprocessor = divide_up(rows, device.multiprocessors);
  const int most_threads = packs_per_thread == 1 ? 1024 : 512;  // of the kernels that launch_plain has
  return threads <= most_threads && rows_a_multiprocessor * threads <= threads_of_multiprocessor;
}

// The fastest shapes on an H200. With few rows small blocks are faster, since they start sooner. With more rows it is
// more threads a row, as long as all rows are resident; beyond that, fewer threads with more loads in flight each.
template <typename T>
RegisterShape choose_register_shape(int row_packs, int64_t rows, bool residual, bool quantize,
                                    const DeviceProperties& device) {
  int packs = row_packs <= 256 ? 2 : 4;
  const int few_rows = device.multiprocessors / (row_packs <= 512 ? 1 : row_packs <= 768 ? 2 : 4);
  if (rows <= few_rows) {
    if (row_packs <= 256) packs = 1;
    if (row_packs > 256 && row_packs <= 640 && (residual || quantize)) packs = 2;
  } else if (all_resident<T>(rows, 1, threads_for(row_packs, 1), residual, device)) {
    packs = 1;
  } else if (all_resident<T>(rows, 2, threads_for(row_packs, 2), residual, device)) {
    packs = 2;
  }
  return {packs, threads_for(row_packs, packs)};
}

template <typename T, bool kResidual, Output kOutput>
cudaError_t launch_plain(const RmsNormPlan& plan, const DeviceProperties& device, cudaStream_t stream) {
  const RmsNormArguments& p = plan.arguments;
  constexpr WeightMode kMode = WeightMode::kPlain;
  const int64_t rows = plan.batch_invariant ? 1 : static_cast<int64_t>(p.rows_in_group) * plan.groups;
  const auto [packs, threads] =
      choose_register_shape<T>(p.length, rows, kResidual, kOutput != Output::kSameType, device);
  const auto launch = [&, threads = threads](auto* kernel) {
    return launch_kernel(kernel, dim3(p.rows_in_group, plan.groups), dim3(threads), 0, device, stream, p);
  };
  if (packs == 1 && threads <= 512) return launch(rms_norm_row_in_registers<T, 1, 512, kResidual, kOutput, kMode>);
  if (packs == 1) return launch(rms_norm_row_in_registers<T, 1, 1024, kResidual, kOutput, kMode>);
  if (packs == 2) return launch(rms_norm_row_in_registers<T, 2, 512, kResidual, kOutput, kMode>);
  if (threads <= 256) return launch(rms_norm_row_in_registers<T, 4, 256, kResidual, kOutput, kMode>);
  return launch(rms_norm_row_in_registers<T, 4, 1024, kResidual, kOutput, kMode>);
}

template <typename T, bool kResidual, Output kOutput>
cudaError_t launch_general(const RmsNormPlan& plan, const DeviceProperties& device, cudaStream_t stream) {
  const RmsNormArguments& p = plan.arguments;
  constexpr WeightMode kMode = WeightMode::kGeneral;
  const int packs = p.length <= 1024 ? 2 : 4;
  const auto launch = [&](auto* kernel) {
    return launch_kernel(kernel, dim3(p.rows_in_group, plan.groups), dim3(threads_for(p.length, packs)), 0, device,
                         stream, p);
  };
  if (packs == 2) return launch(rms_norm_row_in_registers<T, 2, 512, kResidual, kOutput, kMode>);
  return launch(rms_norm_row_in_registers<T, 4, 1024, kResidual, kOutput, kMode>);
}

template <typename T, bool kResidual, Output kOutput, WeightMode kMode>
cudaError_t launch_in_warps(const RmsNormPlan& plan, const DeviceProperties& device, cudaStream_t stream) {
  const RmsNormArguments& p = plan.arguments;
  unsigned lanes = 1;
  while (lanes < static_cast<unsigned>(p.length)) lanes *= 2;
  const unsigned rows_a_block = 128 / lanes;
  const dim3 blocks(divide_up(p.rows_in_group, rows_a_block), plan.groups);
  return launch_kernel(rms_norm_row_in_registers<T, 1, 32, kResidual, kOutput, kMode>, blocks,
                       dim3(lanes, rows_a_block), 0, device, stream, p);
}

template <typename T, bool kResidual, Output kOutput>
cudaError_t launch_in_registers(const RmsNormPlan& plan, const DeviceProperties& device, cudaStream_t stream) {
  const bool in_warps = plan.arguments.length <= 32;
  if (plan.weight_mode == WeightMode::kGeneral) {
    return in_warps ? launch_in_warps<T, kResidual, kOutput, WeightMode::kGeneral>(plan, device, stream)
                    : launch_general<T, kResidual, kOutput>(plan, device, stream);
  }
  return in_warps ? launch_in_warps<T, kResidual, kOutput, WeightMode::kPlain>(plan, device, stream)
                  : launch_plain<T, kResidual, kOutput>(plan, device, stream);
}

template <typename T, bool kPacked, Output kOutput>
cudaError_t launch_long_row(RmsNormPlan plan, const DeviceProperties& device, cudaStream_t stream) {
  const auto kernel = rms_norm_long_row<T, kPacked, kOutput>;
  const int64_t row_bytes = plan.hidden_size * static_cast<int64_t>(sizeof(T));
  size_t shared_bytes = 0;
  if (row_bytes + 1024 <= device.max_shared_memory_per_block) {  // the reduction's static shared memory is small
    plan.arguments.options |= kCacheRow;
    shared_bytes = static_cast<size_t>(row_bytes);
  }
  if (shared_bytes > 48 * 1024 - 1024) {
    // Always the most that a row may take, since other host threads may launch the same kernel with longer rows.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   device.max_shared_memory_per_block - 1024);
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
  return plan.residual ? launch_in_registers<T, true, kOutput>(plan, device, stream)
                       : launch_in_registers<T, false, kOutput>(plan, device, stream);
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
