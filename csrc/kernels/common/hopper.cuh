// The instructions of Hopper that gemm_hopper.cuh and gemm_hopper_tiles.cuh are made of: barriers in shared memory,
// copies of whole boxes by the copy engine, clusters of blocks. Products, and how their operands lie in shared memory:
// hopper_products.cuh.
#pragma once

#include <cuda.h>

#include "kernels/gemm/hopper_operands.h"
#include "wgmma.cuh"

namespace qwen_plugins {

static_assert(kHopperChunk == kPanelColumns);

// A barrier is 8 bytes of shared memory. Its phase ends when all have arrived and all bytes that were announced have
// come; who waits gives the parity of the phase, 0 for the first.
__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After init_barrier: for the copy engine, and after a barrier for the other threads of the cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The stages of the ring in turn, and the parity of the phase of their barriers.
struct StageCursor {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// All threads of a cluster's blocks arrive; who then waits knows that all blocks have begun, and sees what was written.
__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
__device__ __forceinline__ int rank_in_cluster() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int blocks_of_cluster() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
// At the barrier that another block of the cluster, or this one, has in the place of `barrier`. Not `.release.cluster`:
// that waits until everything that this thread ever wrote is visible to the whole chip, each time,
// and who arrives here has only read what the barrier guards.
__device__ __forceinline__ void arrive_at_block(int rank, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// 16 bytes to where `to` is in another block of the cluster; they arrive at that block's `barrier`.
__device__ __forceinline__ void send_to_block(int rank, uint32_t to, uint32_t barrier, const float (&values)[4]) {
  asm volatile(
      "{\n.reg .b32 there, barrier_there;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 barrier_there, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, "
      "[barrier_there];\n}" ::"r"(to),
      "r"(barrier), "r"(rank), "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
      : "memory");
}

// How long the L2 cache keeps what is copied.
__device__ __forceinline__ uint64_t policy_of_what_is_read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t policy_of_what_all_blocks_read() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void prefetch_description(const CUtensorMap& tensor) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&tensor) : "memory");
}
// Begins to copy the box of `tensor` at these coordinates to shared memory; its bytes arrive at `barrier`. What is
// outside of the tensor comes as zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& tensor, uint32_t barrier, uint64_t policy,
                                         int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(&tensor), "r"(barrier), "l"(policy), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& tensor, uint32_t barrier, uint64_t policy,
                                         int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
      "l"(&tensor), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Likewise without a wish for the L2 cache.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& tensor, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&tensor), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
// Likewise, to the same place of the kBlocks blocks of a cluster, and arriving at the barrier of each.
template <int kBlocks>
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& tensor, uint32_t barrier, int c0, int c1,
                                         int c2, int c3) {
  if constexpr (kBlocks == 1) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(&tensor), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
  } else {
    constexpr uint16_t kAll = (1 << kBlocks) - 1;
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
        "l"(&tensor), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(kAll)
        : "memory");
  }
}

// Four 8 x 8 tiles to shared memory, of registers in the layout of multiply_tiles; lane 8i + j gives the address of row
// j of tile i.
__device__ __forceinline__ void store_tiles(uint32_t to, const uint32_t (&tiles)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(tiles[0]),
               "r"(tiles[1]), "r"(tiles[2]), "r"(tiles[3])
               : "memory");
}
// Begins to copy bytes from shared memory, a multiple of 16 from and to such places. The thread that began copies can
// wait until what they read can be written again, or until they are done.
__device__ __forceinline__ void copy_out(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait_until_copies_have_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void wait_for_copies_out() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Transposed 8 x 8 tiles to shared memory, of registers in the layout of transpose_tile: lane 8i + j gives the address
// of the 16 bytes that column j of tile i becomes.
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t tile) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(tile) : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t tile0, uint32_t tile1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(tile0), "r"(tile1)
               : "memory");
}

}  // namespace qwen_plugins
