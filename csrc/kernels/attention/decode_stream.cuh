// Loads a warp's keys and values from the cache to shared memory in tiles of 16 positions. The next keys are in flight
// while values are used, and vice versa. On Hopper and later the loads are bulk copies, which need neither registers
// nor many instructions for what is in flight; elsewhere they are cp.async of 16 bytes.
//
// Two tiles in flight for each warp are enough: twice as many were 2 to 3 % slower, since all other loads wait behind
// them.
#pragma once

#include "kernels/common/elements.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace qwen_plugins::decoding {

enum class Cached { kKeys = 0, kValues = 1 };

template <typename T, int kHeadSize>
class CacheStream {
 public:
  static constexpr int kStep = 16;  // positions of a tile
  static constexpr int kTileBytes = kStep * kHeadSize * static_cast<int>(sizeof(T));
  struct Tiles {  // of one warp
    alignas(16) unsigned char bytes[2][kTileBytes];
  };
  struct Barriers {  // the mbarriers of one warp
    uint64_t of_tile[2];
  };

  // A warp's positions are `begin` to begin + 15, then those `stride` further on, and so on up to `end`. Issues the
  // loads of the first tile of keys and of values.
  __device__ __forceinline__ CacheStream(const T* keys, const T* values, int begin, int end, int stride, Tiles& tiles,
                                         Barriers& barriers)
      : start(begin), end_(end), stride_(stride), keys_(keys), values_(values) {
    if (done()) return;
    tiles_ = shared_address(&tiles);
    barriers_ = shared_address(&barriers);
    if constexpr (kHasHopperInstructions) {
      if (lane() == 0) {
        mbarrier_init(barrier(Cached::kKeys), 1);
        mbarrier_init(barrier(Cached::kValues), 1);
        fence_mbarrier_init();
      }
    }
    __syncwarp();
    load(Cached::kKeys, begin);
    load(Cached::kValues, begin);
  }

  __device__ __forceinline__ bool done() const { return start >= end_; }
  // Waits for the current tile, [16, head_size], and returns its address. Positions from the end on are undefined.
  __device__ __forceinline__ uint32_t wait_for(Cached which) const {
    if constexpr (kHasHopperInstructions) {
      mbarrier_wait(barrier(which), parity_);
    } else {
      cp_async_wait<1>();  // the load of the other tile may be in flight
      __syncwarp();
    }
    return tile(which);
  }
  // Called when the warp has read the current tile: loads the next one in its place.
  __device__ __forceinline__ void release(Cached which) const {
    __syncwarp();
    load(which, start + stride_);
  }
  __device__ __forceinline__ void advance() {
    start += stride_;
    parity_ ^= 1;
  }

  int start;  // the current tile's first position

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ uint32_t tile(Cached which) const {
    return tiles_ + static_cast<uint32_t>(static_cast<int>(which) * kTileBytes);
  }
  __device__ __forceinline__ uint32_t barrier(Cached which) const {
    return barriers_ + static_cast<uint32_t>(static_cast<int>(which) * 8);
  }

  __device__ __forceinline__ void load(Cached which, int first) const {
    const T* const from = (which == Cached::kKeys ? keys_ : values_) + first * int64_t{kHeadSize};
    const int bytes = min(end_ - first, kStep) * kHeadSize * static_cast<int>(sizeof(T));
    if constexpr (kHasHopperInstructions) {
      if (bytes <= 0 || lane() != 0) return;
      mbarrier_arrive_expect_tx(barrier(which), bytes);
      bulk_load(tile(which), from, bytes, barrier(which), evict_first_policy());  // 2 to 4 % faster with the policy
    } else {
      const auto* const source = reinterpret_cast<const unsigned char*>(from);
      for (int i = 16 * lane(); i < bytes; i += 16 * 32) cp_async_16(tile(which) + i, source + i, true);
      cp_async_commit();  // an empty group too: wait_for counts groups
    }
  }

  int end_;
  int stride_;
  int parity_ = 0;
  const T* keys_;
  const T* values_;
  uint32_t tiles_ = 0;
  uint32_t barriers_ = 0;
};

}  // namespace qwen_plugins::decoding
