// How many clusters a Hopper GPU runs at once, for kernels that cut their work accordingly.
#pragma once

#include <cuda_runtime_api.h>

#include <array>

#include "kernels/common/launch.h"

namespace qwen_plugins {

constexpr int kMaxClusterBlocks = 8;

// How many clusters of 1, 2, ... blocks run at once, each block on a multiprocessor of its own.
using ClustersAtOnce = std::array<int, kMaxClusterBlocks + 1>;

// Gives the clusters of the current device, which are read from the driver once for each device.
cudaError_t clusters_at_once(const DeviceProperties& device, ClustersAtOnce& clusters);

}  // namespace qwen_plugins
