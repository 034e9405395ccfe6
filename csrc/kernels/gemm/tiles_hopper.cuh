// The kernel for more rows than decoding has on Hopper: prompts, where arithmetic decides.
//
// A block multiplies a tile of 128 rows of x with kColumns weight rows at a time: two groups of four warps have 64 rows
// of x each, the first operand of wgmma, and one more warp fills a ring of stages with chunks of k of both, from tile
// to tile. Two blocks of a cluster, whose tiles are one below the other, each copy half of the weights that both need:
// without that the L2 cache would limit the products. One block for each multiprocessor, launched while the kernel
// before it runs, as gemm_stream.
#pragma once

#include <cuda.h>

#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "silu.cuh"

namespace qwen_plugins {

constexpr int kTilesRows = 128;  // of x, in a tile
constexpr int kTilesGroups = 2;  // of four warps that multiply
constexpr int kTilesStages = 4;
constexpr int kTilesThreads = 128 * kTilesGroups + 32;
constexpr int kTilesXBytes = kTilesRows * kPanelRowBytes;  // of a stage

// Where things are in shared memory: the ring, what the warps' results wait in, barriers.
template <int kColumns>
struct TilesLayout {
  static constexpr int kStageBytes = kTilesXBytes + kColumns * kPanelRowBytes;
  static constexpr int kRingBytes = kTilesStages * kStageBytes;
  static constexpr int kBarrierBytes = 2 * kTilesStages * 8;
  // Of y, that a warp writes at once: with SwiGLU all of a tile's. The 16 bytes more between rows spread them over all
  // banks.
  static constexpr int kPartColumns = 128;
  static constexpr int kResultRowBytes = 2 * kPartColumns + 16;
  static constexpr int kResultBytes = 16 * kResultRowBytes;  // of a warp
  static constexpr int kBytes = kRingBytes + 4 * kTilesGroups * kResultBytes + kBarrierBytes;
};

struct HopperTilesArguments {
  CUtensorMap weight;  // boxes of kColumns / 2 rows; with SwiGLU 8 gate rows and their 8 up rows in turns
  CUtensorMap x;       // boxes of kTilesRows rows
  const void* bias;
  void* y;
  int32_t columns;       // of y
  int32_t rows;          // of x
  int32_t chunks;        // of k
  int32_t row_tiles;     // each of the rows of all blocks of a cluster
  int32_t column_tiles;  // each of kColumns weight rows
  bool constant_weight;
};

// The tiles of a cluster in their order: bands of row tiles, and in a band column after column, so that what runs at
// once reads few rows of x and few weights, which the L2 cache holds.
class TileOrder {
 public:
  __device__ __forceinline__ TileOrder(const HopperTilesArguments& p, int first, int step)
      : p_(p), index_(first), step_(step) {
    find();
  }
  __device__ __forceinline__ bool done() const { return index_ >= p_.row_tiles * p_.column_tiles; }
  __device__ __forceinline__ void advance() {
    index_ += step_;
    find();
  }
  __device__ __forceinline__ int row_tile() const { return row_tile_; }
  __device__ __forceinline__ int column_tile() const { return column_tile_; }

 private:
  static constexpr int kBand = 8;

  __device__ __forceinline__ void find() {
    if (done()) return;
    const int band = index_ / (kBand * p_.column_tiles);
    const int height = min(kBand, p_.row_tiles - band * kBand);
    const int within = index_ - band * kBand * p_.column_tiles;
    row_tile_ = band * kBand + within % height;
    column_tile_ = within / height;
  }

  const HopperTilesArguments& p_;
  int index_, step_;
  int row_tile_ = 0, column_tile_ = 0;
};

// Where things are in a block's shared memory, and which block of its cluster it is.
template <int kColumns, int kBlocks>
struct TilesBlock {
  const HopperTilesArguments& p;
  using Layout = TilesLayout<kColumns>;
  const uint32_t ring;  // at a multiple of 1024
  const uint32_t results = ring + Layout::kRingBytes;
  const uint32_t barriers = results + 4 * kTilesGroups * Layout::kResultBytes;
  const int rank = kBlocks == 1 ? 0 : rank_in_cluster();

  __device__ __forceinline__ TilesBlock(const HopperTilesArguments& arguments, uint32_t shared)
      : p(arguments), ring(shared) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ __forceinline__ uint32_t x(int stage) const { return ring + stage * Layout::kStageBytes; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return x(stage) + kTilesXBytes; }

  __device__ __forceinline__ TileOrder tiles() const {
    return {p, static_cast<int>(blockIdx.x) / kBlocks, static_cast<int>(gridDim.x) / kBlocks};
  }
  __device__ __forceinline__ int first_row(const TileOrder& tile) const {
    return (tile.row_tile() * kBlocks + rank) * kTilesRows;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < kTilesStages; ++stage) {
      init_barrier(full(stage), 1);
      init_barrier(empty(stage), kTilesGroups * kBlocks);
    }
    publish_barriers();
  }
  // Of all blocks of the cluster: what each writes to the others' shared memory needs them, and their barriers.
  __device__ __forceinline__ void synchronise_cluster() const {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      arrive_in_cluster();
      wait_for_cluster();
    }
  }
};

// What the copying thread does: all chunks of the block's tiles, as far ahead as the ring is long.
template <int kColumns, int kBlocks, bool kSwiglu>
class TilesCopies {
 public:
  __device__ __forceinline__ explicit TilesCopies(const TilesBlock<kColumns, kBlocks>& block)
      : block_(block), tile_(block.tiles()) {}

  // Weights of the first stages, which do not depend on the kernel before, and after wait_for_previous_kernel their x.
  __device__ __forceinline__ void begin_weights() {
    for (int stage = 0; stage < kTilesStages && !tile_.done(); ++stage, advance()) copy_weight(stage);
  }
  __device__ __forceinline__ void begin_x() const {
    TilesCopies copies(block_);
    for (int stage = 0; stage < kTilesStages && !copies.tile_.done(); ++stage, copies.advance()) copies.copy_x(stage);
  }
  __device__ __forceinline__ void copy_the_rest() {
    for (StageCursor cursor; !tile_.done(); cursor.advance(kTilesStages), advance()) {
      wait_for_phase(block_.empty(cursor.stage), cursor.parity);
      copy_weight(cursor.stage);
      copy_x(cursor.stage);
    }
  }

 private:
  static constexpr int kHalfColumns = kColumns / 2;

  __device__ __forceinline__ void advance() {
    if (++chunk_ < block_.p.chunks) return;
    chunk_ = 0;
    tile_.advance();
  }
  // Also announces all that comes to this stage, from the other block of the cluster too.
  __device__ __forceinline__ void copy_weight(int stage) const {
    arrive_and_expect(block_.full(stage), TilesLayout<kColumns>::kStageBytes);
    if constexpr (kBlocks == 1) {
      copy_half(stage, 0);
      copy_half(stage, 1);
    } else {
      copy_half(stage, block_.rank);
    }
  }
  __device__ __forceinline__ void copy_half(int stage, int half) const {
    const uint32_t to = block_.weights(stage) + half * kHalfColumns * kPanelRowBytes;
    const int row = tile_.column_tile() * kColumns + half * kHalfColumns;
    // With SwiGLU the coordinates are k, gate row of 8, gate or up, 8 gate rows.
    copy_box<kBlocks>(to, block_.p.weight, block_.full(stage), chunk_ * kHopperChunk, kSwiglu ? 0 : row, 0,
                      kSwiglu ? row / 16 : 0);
  }
  __device__ __forceinline__ void copy_x(int stage) const {
    copy_box(block_.x(stage), block_.p.x, block_.full(stage), chunk_ * kHopperChunk, block_.first_row(tile_));
  }

  const TilesBlock<kColumns, kBlocks>& block_;
  TileOrder tile_;
  int chunk_ = 0;
};

// What four warps that multiply together do. A thread has the sums of two rows of x, eight apart, in every tile of 8
// weight rows two of each; with SwiGLU a tile of gate rows is followed by its up rows.
template <typename T, int kColumns, int kBlocks, bool kSwiglu>
class TilesProducts {
 public:
  __device__ __forceinline__ explicit TilesProducts(const TilesBlock<kColumns, kBlocks>& block)
      : block_(block), p_(block.p) {}

  __device__ __forceinline__ void multiply_tile() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    begin_chunk();
    for (int chunk = 1; chunk < p_.chunks; ++chunk) {
      const int multiplied = cursor_.stage;
      cursor_.advance(kTilesStages);
      begin_chunk();
      wait_for_products<1>();
      release(multiplied);
    }
    wait_for_products<0>();
    release(cursor_.stage);
    cursor_.advance(kTilesStages);
  }

  // Leaves y to the copy engine, by way of the warp's own part of shared memory: the next tile does not wait for it.
  __device__ __forceinline__ void write_tile(const TileOrder& tile) {
    const int first_row = block_.first_row(tile) + 16 * warp_;
    const int first_column = tile.column_tile() * (kSwiglu ? kColumns / 2 : kColumns);
    if (p_.bias != nullptr) add_bias(first_column);
    write_parts(first_row, first_column);
  }

 private:
  static constexpr int kTiles = kColumns / 8;

  __device__ __forceinline__ void begin_chunk() {
    wait_for_phase(block_.full(cursor_.stage), cursor_.parity);
    const uint32_t x = block_.x(cursor_.stage) + group_ * 64 * kPanelRowBytes;
    begin_products();
#pragma unroll
    for (int k = 0; k < kHopperChunk * 2; k += 32) {
      multiply_async<T>(sums_, operand(x + k, 16), operand(block_.weights(cursor_.stage) + k, 16));
    }
    commit_products();
  }
  // To all who copy to this stage.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 128 != 0) return;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      if constexpr (kBlocks == 1) {
        arrive(block_.empty(stage));
      } else {
        arrive_at_block(rank, block_.empty(stage));
      }
    }
  }

  // Apart from writing, so that products without a bias have no instructions for it.
  __device__ __forceinline__ void add_bias(int first_column) {
    const T* const bias = static_cast<const T*>(p_.bias) + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int column = first_column + 8 * (kSwiglu ? i / 2 : i);
      if (column >= p_.columns) return;
      const float2 pair = load_pair(bias + column + (kSwiglu && i % 2 == 1 ? p_.columns : 0));
      sums_[i][0] += pair.x;
      sums_[i][1] += pair.y;
      sums_[i][2] += pair.x;
      sums_[i][3] += pair.y;
    }
  }
  static __device__ __forceinline__ float2 load_pair(const T* from) {
    if constexpr (std::is_same_v<T, __half>) return __half22float2(*reinterpret_cast<const __half2*>(from));
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
  }

  // Two neighbours of y, in the row that half of a tile is.
  __device__ __forceinline__ uint32_t results(int tile, int half) const {
    if constexpr (kSwiglu) {
      const float* const gate = &sums_[2 * tile][2 * half];
      const float* const up = &sums_[2 * tile + 1][2 * half];
      return pack_pair<T>(silu<T>(gate[0]) * up[0], silu<T>(gate[1]) * up[1]);
    } else {
      return pack_pair<T>(sums_[tile][2 * half], sums_[tile][2 * half + 1]);
    }
  }
  __device__ __forceinline__ void write_parts(int first_row, int first_column) const {
    constexpr int kYTiles = kSwiglu ? kTiles / 2 : kTiles;
    constexpr int kPartTiles = Layout::kPartColumns / 8;
    const uint32_t staging = block_.results + warp_ * Layout::kResultBytes;
    const uint32_t own_place = staging + lane_ % 16 * Layout::kResultRowBytes + lane_ / 16 * 16;
#pragma unroll
    for (int part = 0; part < kYTiles; part += kPartTiles) {
      wait_until_copies_have_read();
      __syncwarp();
#pragma unroll
      for (int i = part; i < min(part + kPartTiles, kYTiles); i += 2) {
        uint32_t tiles[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) tiles[j] = results(i + j / 2, j % 2);
        store_tiles(own_place + 16 * (i - part), tiles);
      }
      publish_to_products();  // the copy engine sees it as they do
      __syncwarp();
      const int row = first_row + lane_;
      const int column = first_column + 8 * part;
      const int columns = min(8 * min(kPartTiles, kYTiles - part), p_.columns - column);
      if (lane_ < 16 && row < p_.rows && columns > 0) {
        copy_out(static_cast<T*>(p_.y) + static_cast<int64_t>(row) * p_.columns + column,
                 staging + lane_ * Layout::kResultRowBytes, 2 * columns);
      }
    }
  }

  using Layout = TilesLayout<kColumns>;
  const TilesBlock<kColumns, kBlocks>& block_;
  const HopperTilesArguments& p_;
  // The same for all lanes, which the compiler cannot know without the shuffle.
  const int warp_ = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int group_ = warp_ / 4;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  StageCursor cursor_;
  float sums_[kTiles][4];
};

template <typename T, int kColumns, int kBlocks, bool kSwiglu>
__global__ void __launch_bounds__(kTilesThreads, 1) gemm_hopper_tiles(const __grid_constant__ HopperTilesArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(1024) char shared[];
  const TilesBlock<kColumns, kBlocks> block(p, shared_address(shared));
  const bool copies_now = static_cast<int>(threadIdx.x) == 128 * kTilesGroups;
  if (copies_now) {
    prefetch_description(p.weight);
    prefetch_description(p.x);
    block.init_barriers();
  }
  block.synchronise_cluster();
  if (static_cast<int>(threadIdx.x) >= 128 * kTilesGroups) {
    if (copies_now) {
      TilesCopies<kColumns, kBlocks, kSwiglu> copies(block);
      if (!p.constant_weight) wait_for_previous_kernel();
      copies.begin_weights();
      wait_for_previous_kernel();
      copies.begin_x();
      copies.copy_the_rest();
    }
    __syncwarp();
  } else {
    wait_for_previous_kernel();
    TilesProducts<T, kColumns, kBlocks, kSwiglu> products(block);
    for (TileOrder tile = block.tiles(); !tile.done(); tile.advance()) {
      products.multiply_tile();
      products.write_tile(tile);
    }
    wait_for_copies_out();
  }
  if constexpr (kBlocks > 1) block.synchronise_cluster();  // the other block may still write here
}

}  // namespace qwen_plugins
