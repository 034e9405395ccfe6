// Combines the splits of a sequence in one cluster (Hopper and later): its blocks send each other partial results
// through distributed shared memory. Through the L2 cache these would queue behind the keys and values of all blocks.
#pragma once

#include "decode_stream.cuh"
#include "decode_work.cuh"

namespace qwen_plugins::decoding {

// Lies in the shared memory of a block and receives what all blocks of its cluster send, once. Head h of a split
// sequence is combined by block h % (size of the cluster).
template <int kHeadSize>
class Inbox {
 public:
  // Called by all threads, early, since the blocks of a cluster start at different times.
  __device__ __forceinline__ void open(int rank, int size, int num_heads) {
    if constexpr (kHasHopperInstructions) {
      if (threadIdx.x == 0) {
        const uint32_t barrier = shared_address(&barrier_);
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(barrier, size * num_own_heads(rank, size, num_heads) * (kHeadSize + 2) * 4);
      }
      __syncwarp();
      cluster_arrive_relaxed_aligned();
    }
  }
  // Called by all threads before they send: waits until all blocks of the cluster have opened theirs.
  static __device__ __forceinline__ void wait_until_open() {
    if constexpr (kHasHopperInstructions) cluster_wait_aligned();
  }

  static __device__ __forceinline__ int num_own_heads(int rank, int size, int num_heads) {
    return rank < num_heads ? static_cast<int>(static_cast<unsigned>(num_heads - rank + size - 1) / size) : 0;
  }
  // The row for what block `rank` sends of the `index`-th head that this block combines.
  static __device__ __forceinline__ int row(int index, int rank, int size) { return index * size + rank; }

  // Sends elements d ... d + 3 of head h to the block that combines it, and with the first ones the maximum and sum.
  __device__ __forceinline__ void send(int h, int d, const Elements<4>& values, const Partial& total, int rank,
                                       unsigned size) const {
    if constexpr (kHasHopperInstructions) {
      const unsigned owner = static_cast<unsigned>(h) % size;
      const int place = row(static_cast<int>(static_cast<unsigned>(h) / size), rank, static_cast<int>(size));
      const auto in_owner = [&](const void* own) { return map_to_block(shared_address(own), static_cast<int>(owner)); };
      const uint32_t barrier = in_owner(&barrier_);
      store_async(in_owner(&values_[place][d]), barrier, values.at);
      if (d > 0) return;
      const float partial[2] = {total.maximum, total.sum};
      store_async(in_owner(&partials_[place]), barrier, partial);
    }
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kHasHopperInstructions) mbarrier_wait(shared_address(&barrier_), 0);
  }
  __device__ __forceinline__ const float* values(int row) const { return values_[row]; }
  __device__ __forceinline__ float2 partial(int row) const { return partials_[row]; }

 private:
  // The most heads that a block combines, times the blocks that send them: eight heads and seven blocks need most.
  static constexpr int kRows = 14;

  alignas(16) float values_[kRows][kHeadSize];
  float2 partials_[kRows];
  uint64_t barrier_;
};

}  // namespace qwen_plugins::decoding
