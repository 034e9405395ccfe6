// Programmatic dependent launch (Hopper and later): a kernel may be launched while the one before it still runs.
#pragma once

#include <cuda_runtime_api.h>

namespace qwen_plugins {

// Lets the next kernel of the stream start its launch. Without effect before Hopper, or where that kernel was not
// launched with the attribute for it.
__device__ __forceinline__ void trigger_dependent_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the kernels before this one have finished and their writes are visible. Every thread calls it before it
// writes anything, and before it reads anything that its result depends on, weights included: a weight may be the
// output of the kernel just before. (gemm_stream, gemm_hopper and gemm_hopper_tiles read a weight earlier where their
// caller says that no kernel writes it.)
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings the line of `address` to the L2 cache, to stay there. It is no access to the memory: it may come before
// wait_for_previous_kernel(), whoever writes there.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"(address));
}

}  // namespace qwen_plugins
