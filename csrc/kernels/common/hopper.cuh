// Instructions of Hopper and later: mbarriers, clusters, TMA, bulk copies and stmatrix; wgmma.cuh has wgmma.
//
// Code for several architectures calls these only where kHasHopperInstructions is true; code for sm_90a alone calls
// them anywhere. Addresses in shared memory are 32-bit (shared_address in tensor_cores.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qwen_plugins {

// Whether the target architecture has these instructions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasHopperInstructions = true;
#else
constexpr bool kHasHopperInstructions = false;
#endif

// --- mbarriers, each 8 bytes of shared memory. A phase completes when all its arrivals are counted and all its
// expected bytes have been written. A wait names the parity of a phase: 0 for the first, then 1, 0, ...

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised mbarriers visible to TMA and, after a barrier of the cluster, to its other blocks.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The current stage of a pipeline, and the parity of the mbarrier phase to wait for there.
struct PipelineState {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// --- Clusters of blocks.

__device__ __forceinline__ int cluster_block_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Which of the grid's clusters this is, and how many there are; clusters and grids extend along x.
__device__ __forceinline__ int cluster_index() {
  int index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ int num_clusters() {
  int clusters;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(clusters));
  return clusters;
}

// Arrive and wait, the two halves of a barrier of all threads of a cluster. What was written before the arrive is
// visible after the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Likewise for converged warps. The relaxed arrive does not make earlier writes visible.
__device__ __forceinline__ void cluster_arrive_relaxed_aligned() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait_aligned() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Maps an address in this block's shared memory to the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t map_to_block(uint32_t address, int rank) {
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  return address;
}
// Arrives at an mbarrier of any block of the cluster, without `.release.cluster`: each such arrive would wait until all
// earlier writes of this thread are visible to the whole device. It is not needed, because a thread that arrives here
// has only read what the mbarrier guards.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t mapped_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped_barrier) : "memory");
}
// Stores to shared memory of any block of the cluster; the bytes are counted at an mbarrier of that block.
__device__ __forceinline__ void store_async(uint32_t mapped_to, uint32_t mapped_barrier, const float (&values)[4]) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   mapped_to),
               "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(mapped_barrier)
               : "memory");
}
__device__ __forceinline__ void store_async(uint32_t mapped_to, uint32_t mapped_barrier, const float (&values)[2]) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(mapped_to),
      "f"(values[0]), "f"(values[1]), "r"(mapped_barrier)
      : "memory");
}

// --- TMA loads of a box at coordinates c0, c1, ..., the contiguous dimension first. The bytes are counted at the
// mbarrier `barrier`; elements outside of the tensor are loaded as zeros.

// L2 cache policies: evict first for data that is read once, evict last for data that all blocks read.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_normal_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& tensor_map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&tensor_map) : "memory");
}
__device__ __forceinline__ void tma_load_2d(uint32_t to, const CUtensorMap& tensor_map, uint32_t barrier, int c0,
                                            int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&tensor_map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tma_load_2d(uint32_t to, const CUtensorMap& tensor_map, uint32_t barrier,
                                            uint64_t policy, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(&tensor_map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t to, const CUtensorMap& tensor_map, uint32_t barrier,
                                            uint64_t policy, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
      "l"(&tensor_map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t to, const CUtensorMap& tensor_map, uint32_t barrier, int c0,
                                            int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&tensor_map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// Loads to the same address in each block of the mask, which are of this block's cluster; the bytes are counted at the
// mbarrier of each.
__device__ __forceinline__ void tma_load_2d_to_blocks(uint16_t blocks, uint32_t to, const CUtensorMap& tensor_map,
                                                      uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&tensor_map), "r"(barrier), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void tma_load_4d_to_blocks(uint16_t blocks, uint32_t to, const CUtensorMap& tensor_map,
                                                      uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&tensor_map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(blocks)
      : "memory");
}
// Likewise to all of the cluster's kBlocks blocks.
template <int kBlocks>
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t to, const CUtensorMap& tensor_map, uint32_t barrier,
                                                      int c0, int c1) {
  tma_load_2d_to_blocks((1 << kBlocks) - 1, to, tensor_map, barrier, c0, c1);
}
template <int kBlocks>
__device__ __forceinline__ void tma_load_4d_multicast(uint32_t to, const CUtensorMap& tensor_map, uint32_t barrier,
                                                      int c0, int c1, int c2, int c3) {
  if constexpr (kBlocks == 1) {
    tma_load_4d(to, tensor_map, barrier, c0, c1, c2, c3);
  } else {
    tma_load_4d_to_blocks((1 << kBlocks) - 1, to, tensor_map, barrier, c0, c1, c2, c3);
  }
}

// --- Bulk copies of contiguous bytes: sizes and addresses are multiples of 16.

__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void bulk_prefetch_to_l2(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
// Copies from shared memory. The thread that issued the stores can wait until all of them have read their source, or
// until all are complete.
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void bulk_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Copies a box from shared memory to coordinates c0, c1; elements outside of the tensor are not written. The thread
// that issued the stores can wait until all but the latest kPending have read their source.
__device__ __forceinline__ void tma_store_2d(const CUtensorMap& tensor_map, uint32_t from, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\ncp.async.bulk.commit_group;" ::"l"(
          &tensor_map),
      "r"(from), "r"(c0), "r"(c1)
      : "memory");
}
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Orders writes to shared memory before accesses by the async proxy (TMA, bulk copies, wgmma): this thread's, of which
// others learn by a barrier, or those of others, of which this thread has learned so.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- Registers of a warpgroup's threads, a multiple of 8: all of its warps release some, or take those that others
// have released. Only in kernels with __launch_bounds__(threads, 1).

template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Plain accesses of shared memory.

__device__ __forceinline__ uint16_t load_shared_16(uint32_t from) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(from) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_shared_8(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}
__device__ __forceinline__ void load_shared(float (&values)[4], uint32_t from) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, const float (&values)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(values[0]), "f"(values[1]), "f"(values[2]),
               "f"(values[3])
               : "memory");
}
__device__ __forceinline__ void store_shared_32(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_16(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(static_cast<uint16_t>(value)) : "memory");
}

// --- stmatrix: 8 x 8 matrices of 16-bit elements from registers to shared memory. Lane 8i + j gives the address of row
// j of matrix i, or with _trans of its column j.

__device__ __forceinline__ void stmatrix_x4(uint32_t to, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(matrices[0]),
               "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t to, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(matrices[0]),
               "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}
__device__ __forceinline__ void stmatrix_x2_trans(uint32_t to, uint32_t matrix0, uint32_t matrix1) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(matrix0), "r"(matrix1)
               : "memory");
}

}  // namespace qwen_plugins
