// As prefill_tiles.cuh, but with wgmma: warpgroups multiply, with operands in shared memory. Two blocks share a
// multiprocessor: one uses the tensor cores while the other computes its softmax, starts or ends. That leaves a thread
// 128 registers, enough for tiles of 64 keys. (One block with tiles of 128 keys, which computes the next scores during
// the softmax, was slower from 2,048 tokens on and for all batches.)
#include "kernels/common/arithmetic.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/wgmma.cuh"
#include "prefill_hopper.h"
#include "prefill_tiles.cuh"

namespace qwen_plugins {
namespace {

// The shape of a block's tile, with the members of TileShape that TileSoftmax uses.
template <int kHeadSize_, bool kQuantized_>
struct HopperShape {
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr bool kQuantized = kQuantized_;  // the cache is of 8 bits
  static constexpr int kRowTiles = 1;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128;
  static constexpr int kHalfRows = kRows / 2;  // queries of a warpgroup
  static constexpr int kKeys = kPageSize;
  static constexpr int kRowBytes = kHeadSize * 2;
  static constexpr int kKeyStages = 2;
  static constexpr int kValueStages = 3;  // one more: a tile's values are in use until the next tile has been loaded
  static constexpr int kSharedBytes = (kRows + (kKeyStages + kValueStages) * kKeys) * kRowBytes;
};

// Issues the loads (cp.async) of `kRows` rows, zeros from `num_rows` on.
template <typename T, typename Shape, int kRows>
__device__ __forceinline__ void load_tile(uint32_t to, const T* from, int64_t stride, int num_rows) {
  constexpr int kChunks = Shape::kHeadSize / 8;
  constexpr int kStep = Shape::kThreads / kChunks;  // rows; a multiple of 8, so that a thread's swizzle stays the same
  const int first = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  to += swizzled_offset(kRows, first, chunk);
  from += first * stride + chunk * 8;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    cp_async_16(to + row * kSwizzleBytes, from + row * stride, first + row < num_rows);
  }
}

__device__ __forceinline__ void store_shared(uint32_t to, const FullPack& pack) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(pack.words[0]), "r"(pack.words[1]),
               "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
}

// The pipeline stages of a block's keys and values in shared memory, and the loads that fill them from the cache.
template <typename T, typename Shape>
class KeysAndValues {
 public:
  __device__ __forceinline__ KeysAndValues(const PrefillArguments& a, const QueryTile& tile, int head, uint32_t shared)
      : shared_(shared),
        num_keys_(tile.first_position + tile.num_rows),
        dtype_(a.params.cache.dtype),
        cache_(a.params.cache, a.layout, tile.sequence,
               head / (a.params.heads.num_heads / a.params.heads.num_kv_heads)) {
    const KvCache& record = a.params.cache;
    if (record.pages != nullptr) pages_ = record.pages + tile.sequence * int64_t{record.pages_row_stride};
  }

  __device__ __forceinline__ int num_tiles() const { return divide_up(num_keys_, Shape::kKeys); }
  __device__ __forceinline__ uint32_t keys(int tile) const { return shared_ + tile % Shape::kKeyStages * kTileBytes; }
  __device__ __forceinline__ uint32_t values(int tile) const {
    return shared_ + (Shape::kKeyStages + tile % Shape::kValueStages) * kTileBytes;
  }

  // Issues the loads of a tile, one page, if there is one. Codes are converted here, after the loads.
  __device__ __forceinline__ void load(int tile) const {
    const int first = tile * Shape::kKeys;
    if (first >= num_keys_) return;
    const int page = pages_ == nullptr ? tile : pages_[tile];
    const char* const key = cache_.key(page, first);
    const char* const value = key + cache_.value_bytes();
    if constexpr (Shape::kQuantized) {
      convert(keys(tile), key, cache_.key_scale(page, first), num_keys_ - first);
      convert(values(tile), value, cache_.value_scale(page, first), num_keys_ - first);
    } else {
      const auto load = [&](uint32_t to, const char* from) {
        load_tile<T, Shape, Shape::kKeys>(to, reinterpret_cast<const T*>(from), Shape::kHeadSize, num_keys_ - first);
      };
      load(keys(tile), key);
      load(values(tile), value);
    }
  }

  // Waits for a tile, and issues the loads of the next one into stages that all warps have finished with.
  __device__ __forceinline__ void advance(int tile) const {
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    sync_warpgroups();
    if (tile > 0) load(tile + 1);
  }

 private:
  static constexpr int kTileBytes = Shape::kKeys * Shape::kRowBytes;

  // A barrier of all threads. The warpgroups may be in different loops, which __syncthreads does not allow.
  static __device__ __forceinline__ void sync_warpgroups() {
    asm volatile("bar.sync 3, %0;" ::"n"(Shape::kThreads) : "memory");  // warpgroup_sync has 1 and 2
  }

  __device__ __forceinline__ void convert(uint32_t to, const char* codes, const float* scales, int num_rows) const {
    load_codes<T, Shape::kHeadSize, Shape::kKeys, Shape::kThreads>(
        codes, scales, num_rows, dtype_, [&](int row, int chunk, const FullPack& values) {
          store_shared(to + swizzled_offset(Shape::kKeys, row, chunk), values);
        });
  }

  uint32_t shared_;
  int num_keys_;
  CacheDataType dtype_;
  const int32_t* pages_ = nullptr;  // of the sequence
  HeadCacheOf<T, Shape::kHeadSize, Shape::kQuantized> cache_;
};

template <typename T, typename Shape>
class HopperAttention : public TileSoftmax<T, Shape> {
 public:
  using TileSoftmax<T, Shape>::TileSoftmax;

  // scores = queries · keys^T; `queries` is the address of the warpgroup's first row.
  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    wait_for_values();
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < Shape::kHeadSize; d += 16) {
      const int panel = d / kSwizzleColumns * kSwizzleBytes;
      const int column = d % kSwizzleColumns * 2;
      wgmma<T>(this->scores_[0], matrix_descriptor(queries + panel * Shape::kRows + column, 16),
               matrix_descriptor(keys + panel * Shape::kKeys + column, 16), d > 0);
    }
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }

  // Issues results += probabilities · values; wait_for_values() waits for it.
  __device__ __forceinline__ void start_values(uint32_t values) {
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 16; ++i) this->pack_probabilities(probabilities_[i], 0, 2 * i);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 16; ++i) {
      wgmma<T>(this->results_[0], probabilities_[i],
               matrix_descriptor(values + 16 * i * kSwizzleBytes, Shape::kKeys * kSwizzleBytes));
    }
    wgmma_commit_group();
  }
  __device__ __forceinline__ void wait_for_values() { wgmma_wait_group<0>(); }

  // Writes the context; `row` is the warp's first, `first_element` the first of the block's first row.
  __device__ __forceinline__ void write(char* shared, int row, const PrefillAttentionParams& p, int64_t first_element,
                                        int64_t stride, int num_rows) {
    this->divide_by_sums();
    warpgroup_sync(1 + row / Shape::kHalfRows);  // all warps have multiplied the queries
    if (p.context_scale == nullptr) {
      write_elements<2>(
          shared, row, static_cast<char*>(p.context) + first_element * 2, stride * 2, num_rows,
          [](char* to, const float* pair) { *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(pair[0], pair[1]); });
    } else {
      const float factor = finite_reciprocal(*p.context_scale);
      write_elements<1>(shared, row, static_cast<char*>(p.context) + first_element, stride, num_rows,
                        [&](char* to, const float* pair) {
                          const float scaled[2] = {pair[0] * factor, pair[1] * factor};
                          store_context_codes(to, scaled, p.context_dtype);
                        });
    }
  }

 private:
  // Writes elements of kBytes by way of shared memory, over the queries, so that whole lines are written. `stride` is
  // in bytes; `put(to, pair)` stores two neighbours.
  template <int kBytes, typename Put>
  __device__ __forceinline__ void write_elements(char* shared, int row, char* context, int64_t stride, int num_rows,
                                                 const Put& put) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int d = 0; d < Shape::kHeadSize; d += 8) {
        const int offset = swizzled_offset(Shape::kRows, row + 8 * half + this->lane() / 4, d * kBytes / 16);
        put(shared + offset + d * kBytes % 16 + this->lane() % 4 * 2 * kBytes, &this->results_[0][d / 8][2 * half]);
      }
    __syncwarp();
    constexpr int kChunks = Shape::kHeadSize * kBytes / 16;
#pragma unroll
    for (int i = this->lane(); i < 16 * kChunks; i += 32) {
      const int to = row + i / kChunks;
      if (to >= num_rows) break;
      *reinterpret_cast<FullPack*>(context + to * stride + i % kChunks * 16) =
          *reinterpret_cast<const FullPack*>(shared + swizzled_offset(Shape::kRows, to, i % kChunks));
    }
  }

  uint32_t probabilities_[Shape::kKeys / 16][4];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2) attend_on_hopper(const __grid_constant__ PrefillArguments a) {
  const PrefillAttentionParams& p = a.params;
  extern __shared__ __align__(1024) char shared[];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  QueryTile tile;
  const int head = static_cast<int>(blockIdx.x);
  if (!find_tile(p, static_cast<int>(blockIdx.y), Shape::kRows, tile)) return;
  const uint32_t queries = shared_address(shared);
  const KeysAndValues<T, Shape> cache(a, tile, head, queries + Shape::kRows * Shape::kRowBytes);
  const int64_t stride = int64_t{p.heads.num_heads} * Shape::kHeadSize;
  const int64_t first_element = tile.first_token * stride + head * Shape::kHeadSize;
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int first_row = warp / 4 * Shape::kHalfRows;  // of the warpgroup
  const int num_tiles = cache.num_tiles();
  const int last_position = tile.first_position + first_row + Shape::kHalfRows - 1;
  // Tiles of keys that the warpgroup's queries see.
  const int seen = first_row < tile.num_rows ? min(num_tiles, last_position / Shape::kKeys + 1) : 0;

  load_tile<T, Shape, Shape::kRows>(queries, static_cast<const T*>(p.queries) + first_element, stride, tile.num_rows);
  cache.load(0);
  cache.load(1);
  HopperAttention<T, Shape> attention(tile.first_position + 16 * warp, p.softmax_scale * kLog2E);
  int i = 0;
#pragma unroll 1
  for (; i < seen; ++i) {
    cache.advance(i);
    attention.multiply_keys(queries + first_row * kSwizzleBytes, cache.keys(i));
    attention.mask(i * Shape::kKeys);
    attention.apply_softmax();
    attention.rescale_results();
    attention.start_values(cache.values(i));
  }
  attention.wait_for_values();
  // Takes part in the loads for the other warpgroup. This is a separate loop because the compiler serialises wgmmas
  // that are under a condition.
#pragma unroll 1
  for (; i < num_tiles; ++i) cache.advance(i);
  attention.write(shared, 16 * warp, p, first_element, stride, tile.num_rows);
}

template <typename T, typename Shape>
cudaError_t launch(const PrefillArguments& a, const DeviceProperties& device, cudaStream_t stream) {
  auto* const kernel = attend_on_hopper<T, Shape>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  const PrefillAttentionParams& p = a.params;
  // The most tiles that so many tokens of so many sequences can have.
  const auto tiles = static_cast<unsigned>((p.tokens + int64_t{p.sequences} * (Shape::kRows - 1)) / Shape::kRows);
  const auto heads = static_cast<unsigned>(p.heads.num_heads);
  const dim3 blocks(heads, tiles);  // the longest tiles of all heads come first
  return launch_kernel(kernel, blocks, dim3(Shape::kThreads), Shape::kSharedBytes, device, stream, a);
}

template <int kHeadSize, bool kQuantized>
cudaError_t launch_for_type(const PrefillArguments& a, const DeviceProperties& device, cudaStream_t stream) {
  using Shape = HopperShape<kHeadSize, kQuantized>;
  if (a.params.heads.dtype == DataType::kFloat16) return launch<__half, Shape>(a, device, stream);
  return launch<__nv_bfloat16, Shape>(a, device, stream);
}

}  // namespace

bool takes_prefill_hopper(const AttentionHeads& heads, const DeviceProperties& device) {
  return device.major == 9 && heads.dtype != DataType::kFloat32 && (heads.head_size == 64 || heads.head_size == 128);
}

cudaError_t launch_prefill_hopper(const PrefillArguments& a, const DeviceProperties& device, cudaStream_t stream) {
  const bool quantized = a.params.cache.dtype != CacheDataType::kSame;
  if (a.params.heads.head_size == 64) {
    return quantized ? launch_for_type<64, true>(a, device, stream) : launch_for_type<64, false>(a, device, stream);
  }
  return quantized ? launch_for_type<128, true>(a, device, stream) : launch_for_type<128, false>(a, device, stream);
}

}  // namespace qwen_plugins
