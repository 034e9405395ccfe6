// The GEMM for hundreds of rows and more on Hopper: prompts, where arithmetic is the limit.
//
// A warp-specialised persistent kernel, one block for each multiprocessor. A block computes a tile of 128 rows of x
// times kColumns weight rows at a time: two consumer warpgroups have 64 rows of x each, wgmma's operand a; the weight
// is operand b. The producer warp issues TMA loads into a ring buffer of pipeline stages, kBlockK elements of k each,
// which runs on from tile to tile. Two blocks of a cluster, whose tiles are one below the other, each load half of the
// weights that both need and multicast it: without that the L2 cache would be the limit. Launched while the previous
// kernel runs, as gemm_stream.
#pragma once

#include <cuda.h>

#include "hopper_operands.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/common/wgmma.cuh"
#include "silu.cuh"
#include "tile_order.cuh"

namespace qwen_plugins {

static_assert(kBlockK == kSwizzleColumns);

constexpr int kTilesRows = 128;      // of x, in a tile
constexpr int kTilesWarpgroups = 2;  // consumers of a block
constexpr int kTilesStages = 4;
constexpr int kTilesThreads = kWarpgroupThreads * kTilesWarpgroups + 32;
constexpr int kTilesXBytes = kTilesRows * kSwizzleBytes;  // of a stage

// The layout of shared memory: the ring buffer, the results to be stored, the mbarriers.
template <int kColumns>
struct TilesLayout {
  static constexpr int kStageBytes = kTilesXBytes + kColumns * kSwizzleBytes;
  static constexpr int kRingBytes = kTilesStages * kStageBytes;
  static constexpr int kBarrierBytes = 2 * kTilesStages * 8;
  // Columns of y that a warp stores at a time: with SwiGLU all of a tile's. 16 bytes of padding between rows spread
  // them over all banks.
  static constexpr int kPartColumns = 128;
  static constexpr int kResultRowBytes = 2 * kPartColumns + 16;
  static constexpr int kResultBytes = 16 * kResultRowBytes;  // of a warp
  static constexpr int kBytes = kRingBytes + 4 * kTilesWarpgroups * kResultBytes + kBarrierBytes;
};

struct TilesHopperArguments {
  CUtensorMap weight;  // boxes of kColumns / 2 rows; with SwiGLU alternately 8 gate rows and their 8 up rows
  CUtensorMap x;       // boxes of kTilesRows rows
  const void* bias;
  void* y;
  int32_t columns;       // of y
  int32_t rows;          // of x
  int32_t chunks;        // of kBlockK elements of k
  int32_t row_tiles;     // each of the rows of all blocks of a cluster
  int32_t column_tiles;  // each of kColumns weight rows
  bool constant_weight;
};

// The tile scheduler: which tiles a cluster computes, and in which order.
class TileOrder {
 public:
  __device__ __forceinline__ TileOrder(const TilesHopperArguments& p, int first, int step)
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
    const TilePlace place(index_, p_.row_tiles, p_.column_tiles, kBand);
    row_tile_ = place.row_tile;
    column_tile_ = place.column_tile;
  }

  const TilesHopperArguments& p_;
  int index_, step_;
  int row_tile_ = 0, column_tile_ = 0;
};

// A block's place in its cluster, and the addresses in its shared memory.
template <int kColumns, int kBlocks>
struct TilesBlock {
  const TilesHopperArguments& p;
  using Layout = TilesLayout<kColumns>;
  const uint32_t ring;  // at a multiple of 1024
  const uint32_t results = ring + Layout::kRingBytes;
  const uint32_t barriers = results + 4 * kTilesWarpgroups * Layout::kResultBytes;
  const int rank = kBlocks == 1 ? 0 : cluster_block_rank();

  __device__ __forceinline__ TilesBlock(const TilesHopperArguments& arguments, uint32_t shared)
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
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), kTilesWarpgroups * kBlocks);
    }
    fence_mbarrier_init();
  }
  // A barrier of all threads of the cluster: a block may write to the other's shared memory only after the other has
  // initialised its mbarriers, and while it still runs.
  __device__ __forceinline__ void sync_cluster() const {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      cluster_arrive();
      cluster_wait();
    }
  }
};

// The producer thread: loads all chunks of the block's tiles, as many stages ahead as the ring buffer has.
template <int kColumns, int kBlocks, bool kSwiglu>
class TilesProducer {
 public:
  __device__ __forceinline__ explicit TilesProducer(const TilesBlock<kColumns, kBlocks>& block)
      : block_(block), tile_(block.tiles()) {}

  // Load the weights of the first stages, and, after wait_for_previous_kernel(), their x.
  __device__ __forceinline__ void load_first_weights() {
    for (int stage = 0; stage < kTilesStages && !tile_.done(); ++stage, advance()) load_weight(stage);
  }
  __device__ __forceinline__ void load_first_x() const {
    TilesProducer first(block_);
    for (int stage = 0; stage < kTilesStages && !first.tile_.done(); ++stage, first.advance()) first.load_x(stage);
  }
  __device__ __forceinline__ void load_the_rest() {
    for (PipelineState state; !tile_.done(); state.advance(kTilesStages), advance()) {
      mbarrier_wait(block_.empty(state.stage), state.parity);
      load_weight(state.stage);
      load_x(state.stage);
    }
  }

 private:
  static constexpr int kHalfColumns = kColumns / 2;

  __device__ __forceinline__ void advance() {
    if (++chunk_ < block_.p.chunks) return;
    chunk_ = 0;
    tile_.advance();
  }
  // Also expects the bytes of x, and of the weights that the other block of the cluster loads.
  __device__ __forceinline__ void load_weight(int stage) const {
    mbarrier_arrive_expect_tx(block_.full(stage), TilesLayout<kColumns>::kStageBytes);
    if constexpr (kBlocks == 1) {
      load_half(stage, 0);
      load_half(stage, 1);
    } else {
      load_half(stage, block_.rank);
    }
  }
  __device__ __forceinline__ void load_half(int stage, int half) const {
    const uint32_t to = block_.weights(stage) + half * kHalfColumns * kSwizzleBytes;
    const int row = tile_.column_tile() * kColumns + half * kHalfColumns;
    // Coordinates: encode_weight_tensor_map.
    tma_load_4d_multicast<kBlocks>(to, block_.p.weight, block_.full(stage), chunk_ * kBlockK, kSwiglu ? 0 : row, 0,
                                   kSwiglu ? row / 16 : 0);
  }
  __device__ __forceinline__ void load_x(int stage) const {
    tma_load_2d(block_.x(stage), block_.p.x, block_.full(stage), chunk_ * kBlockK, block_.first_row(tile_));
  }

  const TilesBlock<kColumns, kBlocks>& block_;
  TileOrder tile_;
  int chunk_ = 0;
};

// A consumer warpgroup. A thread accumulates two rows of x, eight apart, times two rows of every tile of 8 weight rows;
// with SwiGLU a tile of gate rows is followed by the tile of their up rows.
template <typename T, int kColumns, int kBlocks, bool kSwiglu>
class TilesConsumer {
 public:
  __device__ __forceinline__ explicit TilesConsumer(const TilesBlock<kColumns, kBlocks>& block)
      : block_(block), p_(block.p) {}

  __device__ __forceinline__ void multiply_tile() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    start_chunk();
    for (int chunk = 1; chunk < p_.chunks; ++chunk) {
      const int previous_stage = state_.stage;
      state_.advance(kTilesStages);
      start_chunk();
      wgmma_wait_group<1>();
      release(previous_stage);
    }
    wgmma_wait_group<0>();
    release(state_.stage);
    state_.advance(kTilesStages);
  }

  // Stores y with bulk copies, by way of the warp's own part of shared memory: the next tile does not wait for them.
  __device__ __forceinline__ void write_tile(const TileOrder& tile) {
    const int first_row = block_.first_row(tile) + 16 * warp_;
    const int first_column = tile.column_tile() * (kSwiglu ? kColumns / 2 : kColumns);
    if (p_.bias != nullptr) add_bias(first_column);
    write_parts(first_row, first_column);
  }

 private:
  static constexpr int kTiles = kColumns / 8;

  // Issues a chunk's wgmmas as one group.
  __device__ __forceinline__ void start_chunk() {
    mbarrier_wait(block_.full(state_.stage), state_.parity);
    const uint32_t x = block_.x(state_.stage) + group_ * 64 * kSwizzleBytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK * 2; k += 32) {
      wgmma<T>(sums_, matrix_descriptor(x + k, 16), matrix_descriptor(block_.weights(state_.stage) + k, 16));
    }
    wgmma_commit_group();
  }
  // Releases a stage to the producers of all blocks that write to it.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % kWarpgroupThreads != 0) return;
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      if constexpr (kBlocks == 1) {
        mbarrier_arrive(block_.empty(stage));
      } else {
        mbarrier_arrive_remote(map_to_block(block_.empty(stage), rank));
      }
    }
  }

  // Separate from storing, so that a GEMM without a bias executes no instructions for one.
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

  // Two neighbouring elements of y, in the row of the thread that `half` (0 or 1) names.
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
      bulk_store_wait_read();
      __syncwarp();
#pragma unroll
      for (int i = part; i < min(part + kPartTiles, kYTiles); i += 2) {
        uint32_t tiles[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) tiles[j] = results(i + j / 2, j % 2);
        stmatrix_x4(own_place + 16 * (i - part), tiles);
      }
      fence_proxy_async();  // bulk copies read it
      __syncwarp();
      const int row = first_row + lane_;
      const int column = first_column + 8 * part;
      const int columns = min(8 * min(kPartTiles, kYTiles - part), p_.columns - column);
      if (lane_ < 16 && row < p_.rows && columns > 0) {
        bulk_store(static_cast<T*>(p_.y) + static_cast<int64_t>(row) * p_.columns + column,
                   staging + lane_ * Layout::kResultRowBytes, 2 * columns);
      }
    }
  }

  using Layout = TilesLayout<kColumns>;
  const TilesBlock<kColumns, kBlocks>& block_;
  const TilesHopperArguments& p_;
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp_ = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  const int group_ = warp_ / 4;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  PipelineState state_;
  float sums_[kTiles][4];
};

template <typename T, int kColumns, int kBlocks, bool kSwiglu>
__global__ void __launch_bounds__(kTilesThreads, 1) gemm_hopper_tiles(const __grid_constant__ TilesHopperArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(1024) char shared[];
  const TilesBlock<kColumns, kBlocks> block(p, shared_address(shared));
  constexpr int kFirstProducerThread = kWarpgroupThreads * kTilesWarpgroups;
  const bool is_producer = static_cast<int>(threadIdx.x) == kFirstProducerThread;
  if (is_producer) {
    prefetch_tensor_map(p.weight);
    prefetch_tensor_map(p.x);
    block.init_barriers();
  }
  block.sync_cluster();
  if (static_cast<int>(threadIdx.x) >= kFirstProducerThread) {
    if (is_producer) {
      TilesProducer<kColumns, kBlocks, kSwiglu> producer(block);
      if (!p.constant_weight) wait_for_previous_kernel();
      producer.load_first_weights();
      wait_for_previous_kernel();
      producer.load_first_x();
      producer.load_the_rest();
    }
    __syncwarp();
  } else {
    wait_for_previous_kernel();
    TilesConsumer<T, kColumns, kBlocks, kSwiglu> consumer(block);
    for (TileOrder tile = block.tiles(); !tile.done(); tile.advance()) {
      consumer.multiply_tile();
      consumer.write_tile(tile);
    }
    bulk_store_wait();
  }
  if constexpr (kBlocks > 1) block.sync_cluster();  // the other block may still write here
}

}  // namespace qwen_plugins
