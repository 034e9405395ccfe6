// As prefill_attention_tiles.cuh, with three differences: four warps multiply together, straight from shared memory;
// scores of the next keys are multiplied, and the softmax over them begins, while values are; and both halves of the
// block wait for each other once for each tile of keys (Shah et al., "FlashAttention-3", 2024, without its roles for
// warps).
#include "hopper_products.cuh"
#include "prefill_attention_hopper.h"
#include "prefill_attention_tiles.cuh"

namespace qwen_plugins {
namespace {

// The shape of a warp's part of a tile, and of a block.
template <int kHeadSize_>
struct HopperShape {
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kRowTiles = 1;
  static constexpr int kThreads = 256;
  static constexpr int kRows = 128;
  static constexpr int kKeys = 128;
  static constexpr int kTileBytes = 128 * kHeadSize * 2;  // of queries, keys or values
  static constexpr int kSharedBytes = 5 * kTileBytes + 1024;
};

// Starts the copies of 128 rows, those from `num_rows` on as zeros.
template <typename T, typename Shape>
__device__ __forceinline__ void copy_tile(uint32_t to, const T* from, int64_t stride, int num_rows) {
  constexpr int kChunks = Shape::kHeadSize / 8;
  constexpr int kStep = Shape::kThreads / kChunks;  // rows; a multiple of 8, so that the swizzle is the same
  const int first = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  to += chunk_offset(128, first, chunk);
  from += first * stride + chunk * 8;
#pragma unroll
  for (int row = 0; row < 128; row += kStep) {
    copy_async(to + row * kPanelRowBytes, from + row * stride, first + row < num_rows);
  }
}

template <typename T, typename Shape>
class HopperAttention : public TileSoftmax<T, Shape> {
 public:
  using TileSoftmax<T, Shape>::TileSoftmax;

  // Begins scores = queries · keys^T; `queries` is this half's first row.
  __device__ __forceinline__ void begin_scores(uint32_t queries, uint32_t keys) {
    begin_products();
#pragma unroll
    for (int d = 0; d < Shape::kHeadSize; d += 16) {
      const int offset = d / kPanelColumns * 128 * kPanelRowBytes + d % kPanelColumns * 2;
      multiply_async<T>(this->scores_[0], operand(queries + offset, 16), operand(keys + offset, 16), d > 0);
    }
    commit_products();
  }

  // Begins results += weights · values.
  __device__ __forceinline__ void begin_results(uint32_t values) {
    begin_products();
#pragma unroll
    for (int key = 0; key < Shape::kKeys; key += 16) {
      multiply_async<T>(this->results_[0], weights_[key / 16],
                        operand(values + key * kPanelRowBytes, 128 * kPanelRowBytes));
    }
    commit_products();
  }

  // The weights that begin_results takes, of the scores as apply_softmax left them.
  __device__ __forceinline__ void keep_weights() {
#pragma unroll
    for (int i = 0; i < Shape::kKeys / 16; ++i) this->pack_weights(weights_[i], 0, 2 * i);
  }

  __device__ __forceinline__ void write(T* context, int64_t stride, int num_rows) {
    this->divide_by_sums();
    const int row = this->lane() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= num_rows) continue;
      T* const to = context + (row + 8 * half) * stride + this->lane() % 4 * 2;
#pragma unroll
      for (int d = 0; d < Shape::kHeadSize / 8; ++d) {
        const float* const pair = &this->results_[0][d][2 * half];
        *reinterpret_cast<uint32_t*>(to + 8 * d) = pack_pair<T>(pair[0], pair[1]);
      }
    }
  }

 private:
  uint32_t weights_[Shape::kKeys / 16][4];
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    attend_on_hopper(const __grid_constant__ PrefillAttentionParams p) {
  extern __shared__ char unaligned[];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  QueryTile tile;
  const int head = static_cast<int>(blockIdx.x);
  if (!find_tile(p, static_cast<int>(blockIdx.y), Shape::kRows, tile)) return;
  const int kv_head = head / (p.heads.num_heads / p.heads.num_kv_heads);
  const T* const cache = static_cast<const T*>(p.cache.data);
  const T* const keys = cache + cache_offset(p.heads, p.cache, tile.sequence, 0, kv_head);
  const T* const values = cache + cache_offset(p.heads, p.cache, tile.sequence, 1, kv_head);
  const int64_t stride = int64_t{p.heads.num_heads} * Shape::kHeadSize;
  T* const context = static_cast<T*>(p.context) + tile.first_token * stride + head * Shape::kHeadSize;
  const uint32_t shared_queries = (shared_address(unaligned) + 1023) / 1024 * 1024;
  const int num_keys = tile.first_position + tile.num_rows;
  const int num_tiles = (num_keys + Shape::kKeys - 1) / Shape::kKeys;
  const auto key_tile = [&](int i) { return shared_queries + (1 + i % 2) * Shape::kTileBytes; };
  const auto value_tile = [&](int i) { return shared_queries + (3 + i % 2) * Shape::kTileBytes; };
  const auto copy = [&](uint32_t to, const T* from, int i) {
    const int first = i * Shape::kKeys;
    copy_tile<T, Shape>(to, from + first * int64_t{Shape::kHeadSize}, Shape::kHeadSize, num_keys - first);
  };

  const int warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t half_queries = shared_queries + warp / 4 * 64 * kPanelRowBytes;
  HopperAttention<T, Shape> attention(tile.first_position + 16 * warp, p.softmax_scale * 1.44269504F);  // log2(e)
  copy_tile<T, Shape>(shared_queries, context, stride, tile.num_rows);
  copy(key_tile(0), keys, 0);
  commit_copies();
  if (num_tiles > 1) copy(key_tile(1), keys, 1);
  copy(value_tile(0), values, 0);
  commit_copies();
  wait_for_copies<1>();
  publish_to_products();
  __syncthreads();
  attention.begin_scores(half_queries, key_tile(0));
  wait_for_products<0>();
  attention.mask(0);
  attention.apply_softmax();
  attention.keep_weights();
  for (int i = 0; i + 1 < num_tiles; ++i) {
    wait_for_copies<0>();
    publish_to_products();
    __syncthreads();
    attention.begin_scores(half_queries, key_tile(i + 1));
    attention.begin_results(value_tile(i));
    // Into the places of what was multiplied before the barrier.
    copy(key_tile(i), keys, i + 2);
    copy(value_tile(i + 1), values, i + 1);
    commit_copies();
    wait_for_products<1>();
    attention.mask((i + 1) * Shape::kKeys);
    attention.apply_softmax();
    wait_for_products<0>();
    attention.rescale_results();
    attention.keep_weights();
  }
  wait_for_copies<0>();
  publish_to_products();
  __syncthreads();
  attention.begin_results(value_tile(num_tiles - 1));
  wait_for_products<0>();
  attention.write(context + 16 * warp * stride, stride, tile.num_rows - 16 * warp);
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
