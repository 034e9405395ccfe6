// What the blocks of a cluster send each other (Hopper and later): results of the splits of a sequence, to be combined
// without the way through the L2 cache, where they would wait behind everybody's keys and values.
#pragma once

#include "decode_stream.cuh"
#include "decode_work.cuh"

namespace qwen_plugins::decoding {

// In the shared memory of a block, for what all blocks of its cluster send it; used once. Head h of a split sequence is
// combined by block h % (size of the cluster).
template <int kHeadSize>
class Inbox {
 public:
  // By all threads, early: the blocks of the cluster begin at different times.
  __device__ __forceinline__ void open(int rank, int size, int num_heads) {
    if (threadIdx.x == 0) {
      const uint32_t barrier = shared_address(&barrier_);
      init_barrier(barrier);
      publish_barriers();
      expect_bytes(barrier, size * num_own_heads(rank, size, num_heads) * (kHeadSize + 2) * 4);
    }
    __syncwarp();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  // By all threads, before they send.
  static __device__ __forceinline__ void wait_until_open() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  static __device__ __forceinline__ int num_own_heads(int rank, int size, int num_heads) {
    return rank < num_heads ? static_cast<int>(static_cast<unsigned>(num_heads - rank + size - 1) / size) : 0;
  }
  // The row of what block `rank` sends of the `index`-th head of a block.
  static __device__ __forceinline__ int row(int index, int rank, int size) { return index * size + rank; }

  // Elements d ... d + 3 of head h, to its block; and with the first of them the maximum and sum.
  __device__ __forceinline__ void send(int h, int d, const Elements<4>& values, const Partial& total, int rank,
                                       unsigned size) const {
    const unsigned owner = static_cast<unsigned>(h) % size;
    const int place = row(static_cast<int>(static_cast<unsigned>(h) / size), rank, static_cast<int>(size));
    const uint32_t barrier = in_block(owner, &barrier_);
    const auto word = [](float value) { return bit_cast<uint32_t>(value); };
#if __CUDA_ARCH__ >= 900
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     in_block(owner, &values_[place][d])),
                 "r"(word(values.at[0])), "r"(word(values.at[1])), "r"(word(values.at[2])), "r"(word(values.at[3])),
                 "r"(barrier)
                 : "memory");
    if (d > 0) return;
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                     in_block(owner, &partials_[place])),
                 "r"(word(total.maximum)), "r"(word(total.sum)), "r"(barrier)
                 : "memory");
#endif
  }
  __device__ __forceinline__ void wait() const { wait_for_barrier(shared_address(&barrier_), 0); }
  __device__ __forceinline__ const float* values(int row) const { return values_[row]; }
  __device__ __forceinline__ float2 partial(int row) const { return partials_[row]; }

 private:
  // Of the heads of one block, from each block: most for eight heads and seven blocks.
  static constexpr int kRows = 14;

  static __device__ __forceinline__ uint32_t in_block(unsigned rank, const void* own) {
    uint32_t address = shared_address(own);
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
#endif
    return address;
  }

  alignas(16) float values_[kRows][kHeadSize];
  float2 partials_[kRows];
  uint64_t barrier_;
};

}  // namespace qwen_plugins::decoding
