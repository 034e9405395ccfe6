// Programmatic dependent launch (Hopper and later): a kernel may start while the previous one in the stream still runs.
#pragma once

#include <cuda_runtime_api.h>

namespace qwen_plugins {

// Lets the next kernel of the stream start. Without effect before Hopper, or where that kernel was not launched with
// launch_kernel or launch_clusters.
__device__ __forceinline__ void trigger_dependent_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the previous kernels have finished and their writes are visible. Every thread calls it before it writes
// anything, and before it reads anything that its result depends on, weights included: a weight may be the output of
// the previous kernel. (The GEMM kernels read a weight earlier where their caller promises that no kernel writes it.)
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Prefetches the line of `address` to the L2 cache, with the policy to evict it last. A prefetch reads no value, so it
// may come before wait_for_previous_kernel() even if the previous kernel writes there.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(address));
}

}  // namespace qwen_plugins
