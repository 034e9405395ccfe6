// As prefill_attention_tiles.cuh, but four warps multiply together, straight from shared memory. Two blocks share a
// multiprocessor: one multiplies while the other computes weights, begins or ends. That leaves a thread 128 registers,
// enough for tiles of 64 keys. (One block with 128 keys, and scores of the next keys multiplied during the softmax, was
// slower from 2,048 tokens on and for all batches.)
#include "kernels/common/wgmma.cuh"
#include "prefill_hopper.h"
#include "prefill_tiles.cuh"

namespace qwen_plugins {
namespace {

// The shape of a warp's part of a tile, and of a block.
template <int kHeadSize_>
struct HopperShape {
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kRowTiles = 1;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128;
  static constexpr int kHalfRows = kRows / 2;  // of four warps
  static constexpr int kKeys = 64;
  static constexpr int kRowBytes = kHeadSize * 2;
  static constexpr int kKeyPlaces = 2;
  static constexpr int kValuePlaces = 3;  // one more, because a tile's values are multiplied until the next has come
  static constexpr int kSharedBytes = (kRows + (kKeyPlaces + kValuePlaces) * kKeys) * kRowBytes;
};

// Starts the copies of `kRows` rows, those from `num_rows` on as zeros.
template <typename T, typename Shape, int kRows>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* from, int64_t stride, int num_rows) {
  constexpr int kChunks = Shape::kHeadSize / 8;
  constexpr int kStep = Shape::kThreads / kChunks;  // rows; a multiple of 8, so that the swizzle is the same
  const int first = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  to += chunk_offset(kRows, first, chunk);
  from += first * stride + chunk * 8;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    copy_async(to + row * kPanelRowBytes, from + row * stride, first + row < num_rows);
  }
}

// Where a block's tiles are in shared memory, and what of the cache comes there.
template <typename T, typename Shape>
class KeysAndValues {
 public:
  __device__ __forceinline__ KeysAndValues(const PrefillAttentionParams& p, const QueryTile& tile, int head,
                                           uint32_t shared)
      : shared_(shared), num_keys_(tile.first_position + tile.num_rows) {
    const int kv_head = head / (p.heads.num_heads / p.heads.num_kv_heads);
    const T* const cache = static_cast<const T*>(p.cache.data);
    keys_ = cache + cache_offset(p.heads, p.cache, tile.sequence, 0, kv_head);
    values_ = cache + cache_offset(p.heads, p.cache, tile.sequence, 1, kv_head);
  }

  __device__ __forceinline__ int num_tiles() const { return (num_keys_ + Shape::kKeys - 1) / Shape::kKeys; }
  __device__ __forceinline__ uint32_t keys(int tile) const { return shared_ + tile % Shape::kKeyPlaces * kTileBytes; }
  __device__ __forceinline__ uint32_t values(int tile) const {
    return shared_ + (Shape::kKeyPlaces + tile % Shape::kValuePlaces) * kTileBytes;
  }

  // Starts the copies of a tile, if there is one.
  __device__ __forceinline__ void fetch(int tile) const {
    const int first = tile * Shape::kKeys;
    if (first >= num_keys_) return;
    const int64_t offset = first * int64_t{Shape::kHeadSize};
    copy_tile<T, Shape, Shape::kKeys>(keys(tile), keys_ + offset, Shape::kHeadSize, num_keys_ - first);
    copy_tile<T, Shape, Shape::kKeys>(values(tile), values_ + offset, Shape::kHeadSize, num_keys_ - first);
  }

  // Waits for a tile, and starts the copies of the next one into the places of what all warps have multiplied.
  __device__ __forceinline__ void advance(int tile) const {
    commit_copies();
    wait_for_copies<0>();
    publish_to_products();
    __syncthreads();
    if (tile > 0) fetch(tile + 1);
  }

 private:
  static constexpr int kTileBytes = Shape::kKeys * Shape::kRowBytes;

  uint32_t shared_;
  int num_keys_;
  const T* keys_;
  const T* values_;
};

template <typename T, typename Shape>
class HopperAttention : public TileSoftmax<T, Shape> {
 public:
  using TileSoftmax<T, Shape>::TileSoftmax;

  // scores = queries · keys^T; `queries` is this half's first row.
  __device__ __forceinline__ void multiply_keys(uint32_t queries, uint32_t keys) {
    wait_for_values();
    begin_products();
#pragma unroll
    for (int d = 0; d < Shape::kHeadSize; d += 16) {
      const int panel = d / kPanelColumns * kPanelRowBytes;
      const int column = d % kPanelColumns * 2;
      multiply_async<T>(this->scores_[0], operand(queries + panel * Shape::kRows + column, 16),
                        operand(keys + panel * Shape::kKeys + column, 16), d > 0);
    }
    commit_products();
    wait_for_products<0>();
  }

  // Begins results += weights · values.
  __device__ __forceinline__ void begin_values(uint32_t values) {
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 16; ++i) this->pack_weights(weights_[i], 0, 2 * i);
    begin_products();
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 16; ++i) {
      multiply_async<T>(this->results_[0], weights_[i],
                        operand(values + 16 * i * kPanelRowBytes, Shape::kKeys * kPanelRowBytes));
    }
    commit_products();
  }
  __device__ __forceinline__ void wait_for_values() { wait_for_products<0>(); }

  // By way of the queries' place, so that whole lines are written; `row` is the warp's first.
  __device__ __forceinline__ void write(char* shared, int row, T* context, int64_t stride, int num_rows) {
    constexpr int kChunks = Shape::kHeadSize / 8;
    this->divide_by_sums();
    synchronise_four_warps(1 + row / Shape::kHalfRows);  // all have multiplied the queries
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const float* const pair = &this->results_[0][chunk][2 * half];
        const int offset = chunk_offset(Shape::kRows, row + 8 * half + this->lane() / 4, chunk);
        *reinterpret_cast<uint32_t*>(shared + offset + this->lane() % 4 * 4) = pack_pair<T>(pair[0], pair[1]);
      }
    __syncwarp();
#pragma unroll
    for (int i = this->lane(); i < 16 * kChunks; i += 32) {
      const int to = row + i / kChunks;
      if (to >= num_rows) break;
      *reinterpret_cast<FullPack*>(context + to * stride + i % kChunks * 8) =
          *reinterpret_cast<const FullPack*>(shared + chunk_offset(Shape::kRows, to, i % kChunks));
    }
  }

 private:
  uint32_t weights_[Shape::kKeys / 16][4];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    attend_on_hopper(const __grid_constant__ PrefillAttentionParams p) {
  extern __shared__ __align__(1024) char shared[];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  QueryTile tile;
  const int head = static_cast<int>(blockIdx.x);
  if (!find_tile(p, static_cast<int>(blockIdx.y), Shape::kRows, tile)) return;
  const uint32_t queries = shared_address(shared);
  const KeysAndValues<T, Shape> cache(p, tile, head, queries + Shape::kRows * Shape::kRowBytes);
  const int64_t stride = int64_t{p.heads.num_heads} * Shape::kHeadSize;
  T* const context = static_cast<T*>(p.context) + tile.first_token * stride + head * Shape::kHeadSize;
  // The same for all lanes, which the compiler cannot know without the shuffle.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int first_row = warp / 4 * Shape::kHalfRows;  // of this half
  const int num_tiles = cache.num_tiles();
  const int last_position = tile.first_position + first_row + Shape::kHalfRows - 1;
  // Tiles that this half's queries see.
  const int seen = first_row < tile.num_rows ? min(num_tiles, last_position / Shape::kKeys + 1) : 0;

  copy_tile<T, Shape, Shape::kRows>(queries, context, stride, tile.num_rows);
  cache.fetch(0);
  cache.fetch(1);
  HopperAttention<T, Shape> attention(tile.first_position + 16 * warp, p.softmax_scale * 1.44269504F);  // log2(e)
  int i = 0;
#pragma unroll 1
  for (; i < seen; ++i) {
    cache.advance(i);
    attention.multiply_keys(queries + first_row * kPanelRowBytes, cache.keys(i));
    attention.mask(i * Shape::kKeys);
    attention.apply_softmax();
    attention.rescale_results();
    attention.begin_values(cache.values(i));
  }
  attention.wait_for_values();
  // For the other half's sake. In a loop of its own: products under a condition would be waited for one by one.
#pragma unroll 1
  for (; i < num_tiles; ++i) cache.advance(i);
  attention.write(shared, 16 * warp, context, stride, tile.num_rows);
}

template <typename T, int kHeadSize>
cudaError_t launch(const PrefillAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  using Shape = HopperShape<kHeadSize>;
  auto* const kernel = attend_on_hopper<T, Shape>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  // The most tiles that so many tokens can make of so many sequences.
  const auto tiles = static_cast<unsigned>((p.tokens + int64_t{p.sequences} * (Shape::kRows - 1)) / Shape::kRows);
  const auto heads = static_cast<unsigned>(p.heads.num_heads);
  const dim3 blocks(heads, tiles);  // the long tiles of all heads first
  return launch_kernel(kernel, blocks, dim3(Shape::kThreads), Shape::kSharedBytes, device, stream, p);
}

}  // namespace

bool has_hopper_kernel(const AttentionHeads& heads, const DeviceProperties& device) {
  return device.major == 9 && heads.dtype != DataType::kFloat32 && (heads.head_size == 64 || heads.head_size == 128);
}

cudaError_t launch_hopper_attention(const PrefillAttentionParams& p, const DeviceProperties& device,
                                    cudaStream_t stream) {
  const bool half = p.heads.dtype == DataType::kFloat16;
  if (p.heads.head_size == 64) {
    return half ? launch<__half, 64>(p, device, stream) : launch<__nv_bfloat16, 64>(p, device, stream);
  }
  return half ? launch<__half, 128>(p, device, stream) : launch<__nv_bfloat16, 128>(p, device, stream);
}

}  // namespace qwen_plugins
