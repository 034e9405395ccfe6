// What the launchers of Hopper's products share: descriptions of their operands for the copy engine, and a launch of
// clusters.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "gemm.h"
#include "kernels/common/launch.h"

namespace qwen_plugins {

constexpr int kHopperChunk = 64;  // of k, in a stage of a ring

// Whether the chip is one, and the copy engine and the kernels can take operands of these types, sizes and addresses.
bool is_for_hopper(const GemmParams& params, const DeviceProperties& device);

// The copy engine takes boxes of one chunk of k in the 128-byte swizzle, and of `box_rows` rows. False
// where the driver cannot describe such an operand. The device's context must be the thread's: any call of the runtime
// but cudaGetDevice makes it that.
//
// Of the weight: with SwiGLU 8 gate rows and the 8 up rows that belong to them in turns. The coordinates are then k,
// gate row of 8, gate or up, 8 gate rows; else k, row, 0, 0.
bool describe_weight(CUtensorMap& tensor, const GemmParams& params, int box_rows);
bool describe_x(CUtensorMap& tensor, const GemmParams& params, int box_rows);

// A launch of `blocks` blocks in clusters of `cluster`, which may begin while the kernel before runs.
struct ClusterLaunch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};

  ClusterLaunch(int blocks, int cluster, int threads, size_t shared_bytes, cudaStream_t stream);
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

// How many clusters of `cluster` blocks of `kernel` run at once; 0 where the chip, or the part of it that is given, has
// no place for one.
cudaError_t count_clusters(const void* kernel, int cluster, int threads, size_t shared_bytes, int* clusters);

}  // namespace qwen_plugins
