// wgmma, the matrix multiply of a warpgroup (sm_90a): how its operands lie in shared memory, and the instructions.
#pragma once

#include "elements.cuh"
#include "wgmma_macros.cuh"

namespace qwen_plugins {

constexpr int kWarpgroupThreads = 128;

// A tile in shared memory is column panels of 64 16-bit elements, one panel after the other: rows of 128 bytes whose
// eight 16-byte chunks are permuted by the row (the 128-byte swizzle). A panel begins at a multiple of 1024 bytes.
constexpr int kSwizzleColumns = 64;
constexpr int kSwizzleBytes = 128;

// The byte offset of chunk `chunk` (8 columns) of a row, in a tile of `rows` rows.
__device__ __forceinline__ int swizzled_offset(int rows, int row, int chunk) {
  return (chunk / 8 * rows + row) * kSwizzleBytes + (chunk % 8 ^ row % 8) * 16;
}

// The matrix descriptor of an operand in shared memory. `panel_bytes` is the distance of its panels (the leading
// dimension byte offset), which is only used for an MN-major operand, whose rows are the k dimension.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared_address, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStrideOfEightRows = uint64_t{8 * kSwizzleBytes / 16} << 32;
  return kSwizzle128 | kStrideOfEightRows | static_cast<uint64_t>(panel_bytes / 16) << 16 |
         (shared_address & 0x3ffff) >> 4;
}

// The descriptor of an operand that begins `bytes` bytes, a multiple of 16, behind the one of `descriptor`.
__device__ __forceinline__ uint64_t moved_descriptor(uint64_t descriptor, uint32_t bytes) {
  const auto low = static_cast<uint32_t>(descriptor) + bytes / 16;  // no carry: 14 bits have all of shared memory
  return (descriptor & 0xffffffff00000000) | low;
}

// Must precede the first wgmma, and every wgmma that uses registers which other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` of the latest groups are incomplete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// A barrier of one warpgroup: `barrier` is the number of a named barrier, of which 0 is that of __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

// c [64 x 8 kTiles] += a [64 x 16] · b [8 kTiles x 16]^T, both given by matrix descriptors. Each warp has 16 rows of c,
// in tiles of 8 columns with the layout of mma_m16n8k16.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  QWEN_WGMMA_OF_16_BITS(QWEN_WGMMA_SHARED, ", 1, 1, 0, 0", c, a, b);
}

// Likewise; c = a · b^T if not `accumulate`.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&c)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  QWEN_WGMMA_OF_16_BITS(QWEN_WGMMA_ACCUMULATE, ", 1, 1, 0, 0", c, a, b, static_cast<int>(accumulate));
}

// c [64 x 8 kTiles] += a [64 x 16] · b [16 x 8 kTiles], a in registers with the layout of mma_m16n8k16.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  QWEN_WGMMA_OF_16_BITS(QWEN_WGMMA_A_IN_REGISTERS, ", 1, 1, 1", c, a, b, "1");
}

// c [64 x 8 kTiles] += a [64 x 16] · b [8 kTiles x 16]^T, a in registers with the layout of mma_m16n8k16.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_transposed(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  QWEN_WGMMA_OF_16_BITS(QWEN_WGMMA_A_IN_REGISTERS, ", 1, 1, 0", c, a, b, "1");
}

// Likewise c = a · b^T, whatever c was.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_transposed_first(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  QWEN_WGMMA_OF_16_BITS(QWEN_WGMMA_A_IN_REGISTERS, ", 1, 1, 0", c, a, b, "0");
}

}  // namespace qwen_plugins
