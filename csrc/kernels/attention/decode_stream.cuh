// Loads a warp's keys and values from the cache to shared memory in tiles of 16 positions, or of 32 with 8-bit codes,
// which are as many bytes; the scales of the codes come with them. The next keys are in flight while values are used,
// and vice versa. On Hopper and later the loads are bulk copies, which need neither registers nor many instructions for
// what is in flight; elsewhere they are cp.async of 16 bytes.
//
// Two tiles in flight for each warp are enough: twice as many, or longer ones, were 2 to 3 % slower, since all other
// loads wait behind them.
#pragma once

#include "decode_work.cuh"
#include "kernels/common/elements.cuh"
#include "kernels/common/hopper.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace qwen_plugins::decoding {

enum class Cached { kKeys = 0, kValues = 1 };

template <typename T, int kHeadSize, bool kQuantized>
class CacheStream {
 public:
  using Cache = HeadCacheOf<T, kHeadSize, kQuantized>;
  static constexpr int kTokenBytes = kHeadSize * (kQuantized ? 1 : static_cast<int>(sizeof(T)));
  static constexpr int kStep = kQuantized ? 32 : 16;   // positions of a tile
  static constexpr int kScales = kStep * kTokenBytes;  // the offset of a tile's scales
  static constexpr int kScaleBytes = kQuantized ? kStep * 4 : 0;
  static constexpr int kTileBytes = kScales + kScaleBytes;
  struct Tiles {  // of one warp
    alignas(16) unsigned char bytes[2][kTileBytes];
  };
  struct Barriers {  // the mbarriers of one warp
    uint64_t of_tile[2];
  };

  // A warp's positions are `begin` to begin + 15, then those `stride` further on, and so on up to `end`. Issues the
  // loads of the first tile of keys and of values.
  __device__ __forceinline__ CacheStream(const Cache& cache, const PageNumbers& pages, int begin, int end, int stride,
                                         Tiles& tiles, Barriers& barriers)
      : start(begin), end_(end), stride_(stride), cache_(cache), pages_(pages) {
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
    page_ = pages_(begin);
    load(Cached::kKeys, begin);
    load(Cached::kValues, begin);
    find_next_page();
  }

  __device__ __forceinline__ bool done() const { return start >= end_; }
  // Waits for the current tile, [kStep, head_size] and at kScales its scales, and returns its address. Positions from
  // the end on are undefined.
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
    find_next_page();
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

  __device__ __forceinline__ void find_next_page() {
    if (start + stride_ < end_) page_ = pages_(start + stride_);
  }

  // Loads the tile at `first`, which is in page `page_`.
  __device__ __forceinline__ void load(Cached which, int first) const {
    const int bytes = min(end_ - first, kStep) * kTokenBytes;
    const uint32_t to = tile(which);
    const char* const from = cache_.key(page_, first) + (which == Cached::kKeys ? 0 : cache_.value_bytes());
    if constexpr (kHasHopperInstructions) {
      if (bytes <= 0 || lane() != 0) return;
      mbarrier_arrive_expect_tx(barrier(which), bytes + kScaleBytes);
      bulk_load(to, from, bytes, barrier(which), evict_first_policy());  // 2 to 4 % faster with the policy
      if constexpr (kQuantized) {
        bulk_load(to + kScales, scales(which, first), kScaleBytes, barrier(which), evict_first_policy());
      }
    } else {
      for (int i = 16 * lane(); i < bytes; i += 16 * 32) cp_async_16(to + i, from + i, true);
      if constexpr (kQuantized) {
        const int i = 16 * lane();
        if (bytes > 0 && i < kScaleBytes) cp_async_16(to + kScales + i, scales(which, first) + 4 * lane(), true);
      }
      cp_async_commit();  // an empty group too: wait_for counts groups
    }
  }
  // The scales of a whole tile: those from the end on are in the cache, too, and are not used.
  __device__ __forceinline__ const float* scales(Cached which, int first) const {
    return which == Cached::kKeys ? cache_.key_scale(page_, first) : cache_.value_scale(page_, first);
  }

  int end_;
  int stride_;
  int parity_ = 0;
  Cache cache_;
  PageNumbers pages_;
  int page_ = 0;  // of the next tile to load
  uint32_t tiles_ = 0;
  uint32_t barriers_ = 0;
};

}  // namespace qwen_plugins::decoding
