// Attention of prompts on tensor cores (mma): a block computes a tile of the queries of one head of one sequence.
#pragma once

#include "heads.cuh"
#include "kernels/common/arithmetic.h"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "prefill.h"

namespace qwen_plugins {

// The shape of a block's tile. A warp has kRowTiles times 16 queries: with two, each load of keys and values from
// shared memory feeds twice as many mma instructions, and these loads are the limit on Hopper; large heads leave
// registers for one only.
template <int kHeadSize_, int kRowTiles_>
struct TileShape {
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kRowTiles = kRowTiles_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kPageSize;
  // Of a row in shared memory: an odd number of 16-byte chunks, so that the eight rows of an ldmatrix are in different
  // banks.
  static constexpr int kStride = kHeadSize + 8;
  static constexpr int kSharedElements = (kRows + 2 * kKeys) * kStride;
};

struct PrefillArguments {
  PrefillAttentionParams params;
  CacheLayout layout;
};

// A tile of consecutive tokens of one sequence.
struct QueryTile {
  int sequence = 0;
  int64_t first_token = 0;  // in the packed tokens
  int num_rows = 0;         // valid rows
  int first_position = 0;   // in the sequence
};

__device__ __forceinline__ int past_length(const PrefillAttentionParams& p, int sequence) {
  return p.past_lengths == nullptr ? 0 : p.past_lengths[sequence];
}

// Finds tile `index` of all sequences' tiles; the last tile of each sequence comes first because it takes longest. Each
// lane looks at one sequence at a time. Returns false if there are fewer tiles.
__device__ __forceinline__ bool find_tile(const PrefillAttentionParams& p, int index, int tile_rows, QueryTile& tile) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < p.sequences; first += 32) {
    const int sequence = min(first + lane, p.sequences - 1);
    const int begin = p.cu_seqlens[sequence];
    const int length = first + lane < p.sequences ? p.cu_seqlens[sequence + 1] - begin : 0;
    const int tiles = divide_up(length, tile_rows);
    int end = tiles;  // becomes the inclusive prefix sum over the lanes' sequences
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int before = __shfl_up_sync(0xffffffffU, end, offset);
      if (lane >= offset) end += before;
    }
    const unsigned found = __ballot_sync(0xffffffffU, end > index);
    if (found != 0) {
      const int source = __ffs(static_cast<int>(found)) - 1;
      const int row = __shfl_sync(0xffffffffU, end - 1 - index, source) * tile_rows;
      tile.sequence = first + source;
      tile.first_token = __shfl_sync(0xffffffffU, begin, source) + int64_t{row};
      tile.num_rows = min(__shfl_sync(0xffffffffU, length, source) - row, tile_rows);
      tile.first_position = past_length(p, tile.sequence) + row;
      return true;
    }
    index -= __shfl_sync(0xffffffffU, end, 31);
  }
  return false;
}

// Issues the loads (cp.async) of `kRows` rows to shared memory, zeros from `num_rows` on.
template <typename T, typename Shape, int kRows>
__device__ __forceinline__ void load_rows(T* to, const T* from, int64_t stride, int num_rows) {
  constexpr int kChunks = Shape::kHeadSize / 8;  // of a row, one for each thread
  constexpr int kStep = Shape::kThreads / kChunks;
  const int first = static_cast<int>(threadIdx.x) / kChunks;
  const int column = static_cast<int>(threadIdx.x) % kChunks * 8;
  const uint32_t to_address = shared_address(to + first * Shape::kStride + column);
  from += first * stride + column;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    if ((kStep * kChunks == Shape::kThreads || first < kStep) && (kRows % kStep == 0 || first + row < kRows)) {
      cp_async_16(to_address + row * Shape::kStride * static_cast<int>(sizeof(T)), from + row * stride,
                  first + row < num_rows);
    }
  }
}

// Loads `kRows` rows of codes and their scales and puts their values, rounded to T, where `put(row, chunk, values)`
// does: chunks are of 8 elements, and zeros from `num_rows` on. Unlike load_rows, it waits for its loads.
template <typename T, int kHeadSize, int kRows, int kThreads, typename Put>
__device__ __forceinline__ void load_codes(const char* codes, const float* scales, int num_rows, CacheDataType dtype,
                                           const Put& put) {
  constexpr int kChunks = kHeadSize / 16;  // of 16 codes
  constexpr int kPerThread = divide_up(kRows * kChunks, kThreads);
  FullPack loaded[kPerThread];
  float scale[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
    const bool exists = chunk / kChunks < min(num_rows, kRows);
    loaded[i] = exists ? *reinterpret_cast<const FullPack*>(codes + 16 * chunk) : FullPack{};
    scale[i] = exists ? scales[chunk / kChunks] : 0.0F;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
    if (kRows * kChunks % kThreads != 0 && chunk >= kRows * kChunks) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[kVec<T>];
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        float part[4];
        codes_to_floats(part, loaded[i].words[2 * half + word], dtype);
#pragma unroll
        for (int j = 0; j < 4; ++j) values[4 * word + j] = part[j] * scale[i];
      }
      put(chunk / kChunks, chunk % kChunks * 2 + half, pack<T>(values));
    }
  }
}

// The online softmax of a warp's rows: scores and results of kRowTiles tiles of 16, with the layout of mma_m16n8k16.
template <typename T, typename Shape>
class TileSoftmax {
 public:
  // `first_position` is that of the warp's first row; `scale` includes log2(e), since the softmax is computed with
  // exp2.
  __device__ __forceinline__ TileSoftmax(int first_position, float scale)
      : first_position_(first_position), scale_(scale) {
#pragma unroll
    for (auto& row : maxima_) row[0] = row[1] = kLowestScore;
  }

  // A query sees the keys up to its own position.
  __device__ __forceinline__ void mask(int first_key) {
    if (first_key + Shape::kKeys - 1 <= first_position_) return;
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int position = first_position_ + 16 * r + lane() / 4 + i / 2 * 8;
          const int key = first_key + 8 * n + lane() % 4 * 2 + i % 2;
          if (key > position) scores_[r][n][i] = kLowestScore;
        }
  }

  // Replaces scores by exp2(score - largest score so far), unnormalised probabilities; rescale_results must follow.
  __device__ __forceinline__ void apply_softmax() {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float maximum = maxima_[r][half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          maximum = fmaxf(maximum, fmaxf(scores_[r][n][2 * half], scores_[r][n][2 * half + 1]));
        }
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffU, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffU, maximum, 2));
        factors_[r][half] = exp2_approximately((maxima_[r][half] - maximum) * scale_);
        maxima_[r][half] = maximum;
        sums_[r][half] *= factors_[r][half];
        const float offset = maximum * scale_;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores_[r][n][i] = exp2_approximately(scores_[r][n][i] * scale_ - offset);
            sums_[r][half] += scores_[r][n][i];
          }
      }
  }

  // Rescales the results to the new maxima, which rarely grow after the first tiles.
  __device__ __forceinline__ void rescale_results() {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r) {
      if (!__any_sync(0xffffffffU, factors_[r][0] != 1.0F || factors_[r][1] != 1.0F)) continue;
#pragma unroll
      for (auto& tile : results_[r])
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[i] *= factors_[r][i / 2];
    }
  }

  // The probabilities of keys 8 n ... 8 n + 15 as operand a of mma_m16n8k16 or wgmma.
  __device__ __forceinline__ void pack_probabilities(uint32_t (&probabilities)[4], int r, int n) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* const pair = &scores_[r][n + i / 2][i % 2 * 2];
      probabilities[i] = pack_pair<T>(pair[0], pair[1]);
    }
  }

  __device__ __forceinline__ void divide_by_sums() {
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums_[r][half];
        sum += __shfl_xor_sync(0xffffffffU, sum, 1);
        sum += __shfl_xor_sync(0xffffffffU, sum, 2);
        const float factor = __fdividef(1.0F, sum);
#pragma unroll
        for (auto& tile : results_[r])
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) tile[i] *= factor;
      }
  }

 protected:
  static constexpr int kKeyTiles = Shape::kKeys / 8;
  static constexpr int kValueTiles = Shape::kHeadSize / 8;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  float scores_[Shape::kRowTiles][kKeyTiles][4];
  float results_[Shape::kRowTiles][kValueTiles][4] = {};

 private:
  int first_position_;
  float scale_;
  // Of a lane's rows; until divide_by_sums(), sums are of the lane's own columns.
  float maxima_[Shape::kRowTiles][2];
  float sums_[Shape::kRowTiles][2] = {};
  float factors_[Shape::kRowTiles][2];
};

// The matrix multiplies of a warp, with operands in rows of shared memory that are kStride apart.
template <typename T, typename Shape>
class TileAttention : public TileSoftmax<T, Shape> {
 public:
  using TileSoftmax<T, Shape>::TileSoftmax;

  // Scores of the warp's queries and kKeys keys.
  __device__ __forceinline__ void multiply_keys(const T* queries, const T* keys) {
    const uint32_t query_address = shared_address(queries + lane() % 16 * Shape::kStride + lane() / 16 * 8);
    const uint32_t key_address =
        shared_address(keys + (lane() / 16 * 8 + lane() % 8) * Shape::kStride + lane() / 8 % 2 * 8);
#pragma unroll
    for (auto& row : scores_)
#pragma unroll
      for (auto& tile : row)
#pragma unroll
        for (float& score : tile) score = 0.0F;
#pragma unroll
    for (int d = 0; d < Shape::kHeadSize; d += 16) {
      uint32_t q[Shape::kRowTiles][4];
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) ldmatrix_x4(q[r], query_address + bytes(16 * r, d));
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t k[4];
        ldmatrix_x4(k, key_address + bytes(8 * n, d));
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          mma_m16n8k16<T>(scores_[r][n], q[r], k[0], k[1]);
          mma_m16n8k16<T>(scores_[r][n + 1], q[r], k[2], k[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_values(const T* values) {
    const uint32_t address = shared_address(values + lane() % 16 * Shape::kStride + lane() / 16 * 8);
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
      uint32_t probabilities[Shape::kRowTiles][4];
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) this->pack_probabilities(probabilities[r], r, n);
#pragma unroll
      for (int d = 0; d < kValueTiles; d += 2) {
        uint32_t v[4];
        ldmatrix_x4_trans(v, address + bytes(8 * n, 8 * d));
#pragma unroll
        for (int r = 0; r < Shape::kRowTiles; ++r) {
          mma_m16n8k16<T>(results_[r][d], probabilities[r], v[0], v[1]);
          mma_m16n8k16<T>(results_[r][d + 1], probabilities[r], v[2], v[3]);
        }
      }
    }
  }

  // Writes to the warp's rows of shared memory: elements, or codes at the beginning of each row.
  __device__ __forceinline__ void write(T* rows, const PrefillAttentionParams& p) {
    this->divide_by_sums();
    const float factor = p.context_scale == nullptr ? 0.0F : finite_reciprocal(*p.context_scale);
#pragma unroll
    for (int r = 0; r < Shape::kRowTiles; ++r)
#pragma unroll
      for (int d = 0; d < kValueTiles; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const row = rows + (16 * r + 8 * half + lane() / 4) * Shape::kStride;
          const int column = 8 * d + lane() % 4 * 2;
          const float* const pair = &results_[r][d][2 * half];
          if (p.context_scale == nullptr) {
            *reinterpret_cast<uint32_t*>(row + column) = pack_pair<T>(pair[0], pair[1]);
          } else {
            const float scaled[2] = {pair[0] * factor, pair[1] * factor};
            store_context_codes(reinterpret_cast<uint8_t*>(row) + column, scaled, p.context_dtype);
          }
        }
  }

 private:
  using Base = TileSoftmax<T, Shape>;
  using Base::kKeyTiles;
  using Base::kValueTiles;
  using Base::lane;
  using Base::results_;
  using Base::scores_;

  static __device__ __forceinline__ constexpr int bytes(int row, int column) {
    return (row * Shape::kStride + column) * static_cast<int>(sizeof(T));
  }
};

// Copies a warp's results, codes where the context is quantized, from shared memory to the context. There may be fewer
// rows than a warp has, or less than 0.
template <typename T, typename Shape>
__device__ __forceinline__ void copy_context(const PrefillAttentionParams& p, const T* warp_rows, int64_t first_element,
                                             int64_t context_stride, int rows_left) {
  const int element_bytes = p.context_scale == nullptr ? 2 : 1;
  const int chunks = Shape::kHeadSize * element_bytes / 16;
  const int num_rows = min(rows_left, Shape::kWarpRows);
  char* const context = static_cast<char*>(p.context) + first_element * element_bytes;
  for (int chunk = static_cast<int>(threadIdx.x) % 32; chunk < num_rows * chunks; chunk += 32) {
    const int row = chunk / chunks;
    const int column = chunk % chunks;
    reinterpret_cast<FullPack*>(context + row * context_stride * element_bytes)[column] =
        reinterpret_cast<const FullPack*>(warp_rows + row * Shape::kStride)[column];
  }
}

// The next tile's keys are loaded while values are multiplied, and a tile's values while its keys are.
template <typename T, typename Shape, bool kQuantized>
__global__ void __launch_bounds__(Shape::kThreads, 2) attend_tile(const __grid_constant__ PrefillArguments a) {
  const PrefillAttentionParams& p = a.params;
  extern __shared__ __align__(16) char shared[];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  QueryTile tile;
  if (!find_tile(p, static_cast<int>(blockIdx.y), Shape::kRows, tile)) return;
  const int head = static_cast<int>(blockIdx.x);
  const int kv_head = head / (p.heads.num_heads / p.heads.num_kv_heads);
  const HeadCacheOf<T, Shape::kHeadSize, kQuantized> cache(p.cache, a.layout, tile.sequence, kv_head);
  const int64_t context_stride = int64_t{p.heads.num_heads} * Shape::kHeadSize;
  const int64_t first_element = tile.first_token * context_stride + head * Shape::kHeadSize;
  T* const shared_queries = reinterpret_cast<T*>(shared);
  T* const shared_keys = shared_queries + Shape::kRows * Shape::kStride;
  T* const shared_values = shared_keys + Shape::kKeys * Shape::kStride;
  const int num_keys = tile.first_position + tile.num_rows;
  // A tile of keys or, `offset` bytes further on, values: one page of the cache.
  const auto load_cached = [&](T* to, int first, int64_t offset) {
    const int page = page_of(p.cache, tile.sequence, first);
    const char* const from = cache.key(page, first) + offset;
    if constexpr (kQuantized) {
      const float* const scales = offset == 0 ? cache.key_scale(page, first) : cache.value_scale(page, first);
      load_codes<T, Shape::kHeadSize, Shape::kKeys, Shape::kThreads>(
          from, scales, num_keys - first, p.cache.dtype, [&](int row, int chunk, const FullPack& values) {
            *reinterpret_cast<FullPack*>(to + row * Shape::kStride + 8 * chunk) = values;
          });
    } else {
      load_rows<T, Shape, Shape::kKeys>(to, reinterpret_cast<const T*>(from), Shape::kHeadSize, num_keys - first);
      cp_async_commit();
    }
  };

  const int first_row = static_cast<int>(threadIdx.x) / 32 * Shape::kWarpRows;  // of the warp
  T* const warp_rows = shared_queries + first_row * Shape::kStride;
  const int last_position = tile.first_position + first_row + Shape::kWarpRows - 1;
  TileAttention<T, Shape> attention(tile.first_position + first_row, p.softmax_scale * kLog2E);
  load_rows<T, Shape, Shape::kRows>(shared_queries, static_cast<const T*>(p.queries) + first_element, context_stride,
                                    tile.num_rows);
  cp_async_commit();  // codes, which are not loaded with cp.async, commit nothing
  load_cached(shared_keys, 0, 0);
  for (int first = 0; first < num_keys; first += Shape::kKeys) {
    const bool sees_keys = first <= last_position;
    cp_async_wait<0>();
    __syncthreads();
    load_cached(shared_values, first, cache.value_bytes());
    if (sees_keys) attention.multiply_keys(warp_rows, shared_keys);
    cp_async_wait<0>();
    __syncthreads();
    if (first + Shape::kKeys < num_keys) load_cached(shared_keys, first + Shape::kKeys, 0);
    if (!sees_keys) continue;
    attention.mask(first);
    attention.apply_softmax();
    attention.rescale_results();
    attention.add_values(shared_values);
  }
  attention.write(warp_rows, p);
  __syncwarp();
  copy_context<T, Shape>(p, warp_rows, first_element + first_row * context_stride, context_stride,
                         tile.num_rows - first_row);
}

}  // namespace qwen_plugins
