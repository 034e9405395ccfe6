// How a warp's keys and values come from the cache to shared memory without its threads: tiles of 16 positions, the
// next keys on their way while values are used, and the other way round. Bulk copies on Hopper and later, which need
// neither registers nor many instructions for what is in flight; elsewhere asynchronous copies of 16 bytes.
//
// No more is in flight than that: twice as much is 2 to 3 % slower, because everything else then waits behind it.
#pragma once

#include "kernels/common/elements.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace qwen_plugins::decoding {

// Barriers in shared memory that count bytes, by their addresses.
__device__ __forceinline__ void init_barrier(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}
// Makes barriers known to copies, and to the other blocks of a cluster.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
__device__ __forceinline__ void wait_for_barrier(uint32_t barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#endif
}

enum class Cached { kKeys = 0, kValues = 1 };

template <typename T, int kHeadSize>
class CacheStream {
 public:
  static constexpr int kStep = 16;  // positions of a tile
  static constexpr int kTileBytes = kStep * kHeadSize * static_cast<int>(sizeof(T));
  struct Tiles {  // of one warp
    alignas(16) unsigned char bytes[2][kTileBytes];
  };
  struct Barriers {
    uint64_t of_tile[2];
  };

  // A warp's positions are `begin` to begin + 15, those `stride` further, and so on before `end`. The first are on
  // their way when this returns.
  __device__ __forceinline__ CacheStream(const T* keys, const T* values, int begin, int end, int stride, Tiles& tiles,
                                         Barriers& barriers)
      : start(begin), end_(end), stride_(stride), keys_(keys), values_(values) {
    if (done()) return;
    tiles_ = shared_address(&tiles);
    barriers_ = shared_address(&barriers);
    if (lane() == 0) {
      init_barrier(barrier(Cached::kKeys));
      init_barrier(barrier(Cached::kValues));
      publish_barriers();
    }
    __syncwarp();
    fetch(Cached::kKeys, begin);
    fetch(Cached::kValues, begin);
  }

  __device__ __forceinline__ bool done() const { return start >= end_; }
  // The address of the present tile, [16, head_size], when it is there. What is not before the end is undefined.
  __device__ __forceinline__ uint32_t wait_for(Cached which) const {
#if __CUDA_ARCH__ >= 900
    wait_for_barrier(barrier(which), parity_);
#else
    wait_for_copies<1>();  // those after it
    __syncwarp();
#endif
    return tile(which);
  }
  // The present tile has been read: another one takes its place.
  __device__ __forceinline__ void release(Cached which) const {
    __syncwarp();
    fetch(which, start + stride_);
  }
  __device__ __forceinline__ void advance() {
    start += stride_;
    parity_ ^= 1;
  }

  int start;  // the present tile's first position

 private:
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ uint32_t tile(Cached which) const {
    return tiles_ + static_cast<uint32_t>(static_cast<int>(which) * kTileBytes);
  }
  __device__ __forceinline__ uint32_t barrier(Cached which) const {
    return barriers_ + static_cast<uint32_t>(static_cast<int>(which) * 8);
  }

  __device__ __forceinline__ void fetch(Cached which, int first) const {
    const T* const from = (which == Cached::kKeys ? keys_ : values_) + first * int64_t{kHeadSize};
    const int bytes = min(end_ - first, kStep) * kHeadSize * static_cast<int>(sizeof(T));
#if __CUDA_ARCH__ >= 900
    if (bytes <= 0 || lane() != 0) return;
    expect_bytes(barrier(which), bytes);
    uint64_t policy;  // what is read once makes room first: 2 to 4 % faster
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(tile(which)),
        "l"(from), "r"(bytes), "r"(barrier(which)), "l"(policy)
        : "memory");
#else
    const auto* const source = reinterpret_cast<const unsigned char*>(from);
    for (int i = 16 * lane(); i < bytes; i += 16 * 32) copy_async(tile(which) + i, source + i, true);
    commit_copies();  // an empty group too: wait_for counts them
#endif
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
