// The streaming GEMM for up to some hundreds of rows on Hopper: reads the weight once, at the speed of memory.
//
// A warp-specialised persistent kernel. The weight's rows are wgmma's operand a, 64 for each consumer warpgroup, rows
// of x are operand b. Two producer threads issue TMA loads of kBlockK elements of k at a time into two ring buffers,
// one of the tile's weight rows and one of its rows of x, which run on from tile to tile.
//
// A tile has any multiple of 8 weight rows, so that all multiprocessors get the same share of the weight: what is
// loaded is the limit, not what is multiplied. The accumulators of weight rows beyond the tile hold what wgmma made of
// whatever lies behind it in shared memory, and are never used.
//
// The blocks of a cluster may split k (split-K): each owns some rows of x, sends its partial sums of the others to
// their owners through distributed shared memory, and adds what it receives, always in the same order.
//
// As gemm_stream, one block for each multiprocessor, launched while the previous kernel runs (programmatic dependent
// launch): it fills its ring buffer with weights, and waits for that kernel before it loads x.
#pragma once

#include <cuda.h>

#include "hopper_operands.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/common/wgmma.cuh"
#include "silu.cuh"

namespace qwen_plugins {

static_assert(kBlockK == kSwizzleColumns);

constexpr int kWarpgroupRows = 64;  // weight rows of a warpgroup
constexpr int kMaxStages = 32;      // of each ring buffer
constexpr int kFirstStages = 2;     // that are loaded before the others' mbarriers are initialised
constexpr int kProducerWarps = 2;   // of weights and of x
constexpr int kBarrierBytes = (4 * kMaxStages + 2) * 8;
// The mbarriers, and what aligns the ring buffers to 1024 bytes.
constexpr int kSharedOverheadBytes = divide_up(kBarrierBytes, 1024) * 1024 + 1024;

// Bytes of shared memory in which a warpgroup transposes its results.
__host__ __device__ constexpr int staging_bytes_of(int rows) { return divide_up(rows, 16) * 16 * kSwizzleBytes; }

// The consumer warpgroups that a block may have: as many as there are registers for.
constexpr int max_warpgroups_of(int rows) { return rows <= 64 ? 4 : rows <= 192 ? 3 : 2; }

struct StreamHopperArguments {
  CUtensorMap weight;  // boxes of tile_rows; with SwiGLU alternately 8 gate rows and the 8 up rows that belong to them
  CUtensorMap x;
  const void* bias;
  void* y;
  int32_t columns;      // of y
  int32_t rows;         // of x
  int32_t chunks;       // of kBlockK elements of k
  int32_t row_tiles;    // each of kRows rows of x
  int32_t tiles;        // of the weight, times row_tiles
  int32_t tile_rows;    // weight rows of a tile, a multiple of 8, with SwiGLU of 16
  int32_t splits;       // blocks of a cluster that split k
  int32_t owned_tiles;  // tiles of 8 rows of x that a block owns where k is split, the last blocks fewer
  int32_t weight_stages;
  int32_t x_stages;
  bool swiglu;
  bool writes_packs;  // y and its rows begin at multiples of 16 bytes
  bool constant_weight;
};

// Bytes of shared memory for the partial sums that a block of a cluster receives.
constexpr int received_bytes_of(int groups, int splits, int owned_tiles) {
  return (splits - 1) * owned_tiles * groups * kWarpgroupThreads * 16;
}

// A block's part of the GEMM, and the layout of its shared memory.
template <int kRows>
struct StreamBlock {
  static constexpr int kXStageBytes = kRows * kSwizzleBytes;

  const StreamHopperArguments& p;
  const int groups = static_cast<int>(blockDim.x) / kWarpgroupThreads;  // consumer warpgroups
  const int split = p.splits == 1 ? 0 : cluster_block_rank();
  const int first_tile = cluster_index();
  const int tile_step = num_clusters();
  const int first_chunk = p.chunks * split / p.splits;
  const int end_chunk = p.chunks * (split + 1) / p.splits;
  const uint32_t barriers;
  const int weight_stage_bytes = p.tile_rows * kSwizzleBytes;
  // In this order: operand a of the last warpgroup reaches beyond the weights.
  const uint32_t weight_ring = (barriers + kBarrierBytes + 1023) / 1024 * 1024;
  const uint32_t x_ring = weight_ring + p.weight_stages * weight_stage_bytes;
  const uint32_t staging = x_ring + p.x_stages * kXStageBytes;
  const uint32_t received_sums = staging + groups * staging_bytes_of(kRows);

  __device__ __forceinline__ StreamBlock(const StreamHopperArguments& arguments, uint32_t shared)
      : p(arguments), barriers(shared) {}

  __device__ __forceinline__ uint32_t weights_full(int stage) const { return barriers + 32 * stage; }
  __device__ __forceinline__ uint32_t weights_empty(int stage) const { return barriers + 32 * stage + 8; }
  __device__ __forceinline__ uint32_t x_full(int stage) const { return barriers + 32 * stage + 16; }
  __device__ __forceinline__ uint32_t x_empty(int stage) const { return barriers + 32 * stage + 24; }
  // All partial sums have been received.
  __device__ __forceinline__ uint32_t received_barrier() const { return barriers + 32 * kMaxStages; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return weight_ring + stage * weight_stage_bytes; }
  __device__ __forceinline__ uint32_t x(int stage) const { return x_ring + stage * kXStageBytes; }

  // The first rows of a tile. Tiles with the same weights follow each other: they run at the same time, and all but one
  // find the weights in the L2 cache.
  __device__ __forceinline__ int weight_row(int tile) const { return tile / p.row_tiles * p.tile_rows; }
  __device__ __forceinline__ int x_row(int tile) const { return tile % p.row_tiles * kRows; }

  // Where the block `distance` splits ahead sends its partial sums of one owned tile of 8 rows, 16 bytes a thread.
  __device__ __forceinline__ uint32_t received(int distance, int owned_tile) const {
    const int index = (distance - 1) * p.owned_tiles + owned_tile;
    return received_sums + (index * groups * kWarpgroupThreads + static_cast<int>(threadIdx.x)) * 16;
  }
  __device__ __forceinline__ int first_owned_tile() const { return split * p.owned_tiles; }
  __device__ __forceinline__ int end_of_owned_tiles() const {
    return min(kRows / 8, first_owned_tile() + p.owned_tiles);
  }
  __device__ __forceinline__ int owned_tiles() const { return end_of_owned_tiles() - first_owned_tile(); }

  // Each by one thread; the other threads see them after a barrier. Initialising an mbarrier takes tens of cycles.
  __device__ __forceinline__ void init_weight_barriers(int first_stage, int end_stage) const {
    for (int stage = first_stage; stage < end_stage; ++stage) {
      mbarrier_init(weights_full(stage), 1);
      mbarrier_init(weights_empty(stage), groups);
    }
    fence_mbarrier_init();
  }
  __device__ __forceinline__ void init_other_barriers() const {
    for (int stage = 0; stage < p.x_stages; ++stage) {
      mbarrier_init(x_full(stage), 1);
      mbarrier_init(x_empty(stage), groups);
    }
    mbarrier_init(received_barrier(), 1);
    fence_mbarrier_init();
    if (p.splits > 1 && owned_tiles() > 0) {
      // Only warps with weight rows of the tile send sums.
      const int bytes_of_tile = divide_up(p.tile_rows, 16) * 32 * 16;
      mbarrier_arrive_expect_tx(received_barrier(), (p.splits - 1) * owned_tiles() * bytes_of_tile);
    }
  }
};

// A block's chunks in their order, tile after tile.
template <int kRows>
struct ChunkOrder {
  const StreamBlock<kRows>& block;
  int tile = block.first_tile;
  int chunk = block.first_chunk;
  int weight_row = block.weight_row(tile);
  int x_row = block.x_row(tile);

  __device__ __forceinline__ explicit ChunkOrder(const StreamBlock<kRows>& of_block) : block(of_block) {}
  __device__ __forceinline__ bool done() const { return tile >= block.p.tiles; }
  __device__ __forceinline__ void advance() {
    if (++chunk < block.end_chunk) return;
    chunk = block.first_chunk;
    tile += block.tile_step;
    weight_row = block.weight_row(tile);
    x_row = block.x_row(tile);
  }
};

// The producer threads load all chunks of the weight and of x, as many stages ahead as the ring buffer has.
template <int kRows>
class WeightProducer {
 public:
  __device__ __forceinline__ explicit WeightProducer(const StreamBlock<kRows>& block)
      : block_(block),
        p(block.p),
        order_(block),
        policy_(p.row_tiles == 1 ? evict_first_policy() : evict_normal_policy()) {}

  // Loads chunks to the next of the stages before `end_stage`, which are free.
  __device__ __forceinline__ void load_first(int end_stage) {
    for (; stages_loaded_ < end_stage && !order_.done(); ++stages_loaded_) load(stages_loaded_);
  }
  __device__ __forceinline__ void load_the_rest() {
    load_first(p.weight_stages);
    for (PipelineState state; !order_.done(); state.advance(p.weight_stages)) {
      mbarrier_wait(block_.weights_empty(state.stage), state.parity);
      load(state.stage);
    }
  }

 private:
  __device__ __forceinline__ void load(int stage) {
    mbarrier_arrive_expect_tx(block_.weights_full(stage), block_.weight_stage_bytes);
    const int row = order_.weight_row;
    // The coordinates are those of encode_weight_tensor_map.
    tma_load_4d(block_.weights(stage), p.weight, block_.weights_full(stage), policy_, order_.chunk * kBlockK,
                p.swiglu ? 0 : row, 0, p.swiglu ? row / 16 : 0);
    order_.advance();
  }

  const StreamBlock<kRows>& block_;
  const StreamHopperArguments& p;
  ChunkOrder<kRows> order_;
  const uint64_t policy_;
  int stages_loaded_ = 0;
};

template <int kRows>
__device__ __forceinline__ void produce_x(const StreamBlock<kRows>& block) {
  const StreamHopperArguments& p = block.p;
  const uint64_t policy = evict_last_policy();
  PipelineState state;
  int free_stages = p.x_stages;
  for (ChunkOrder<kRows> order(block); !order.done(); order.advance(), state.advance(p.x_stages)) {
    if (--free_stages < 0) mbarrier_wait(block.x_empty(state.stage), state.parity ^ 1);
    mbarrier_arrive_expect_tx(block.x_full(state.stage), block.kXStageBytes);
    tma_load_2d(block.x(state.stage), p.x, block.x_full(state.stage), policy, order.chunk * kBlockK, order.x_row);
  }
}

// A consumer warpgroup: what does not depend on the types of the operands and the result. A thread accumulates two
// weight rows (with SwiGLU a gate row and its up row) times two rows of every tile of 8 rows of x.
//
// `Consumer` derives from it and has
//   multiply_tile(tile): computes sums_, by multiply_chunks() or its own loop, with all that results() needs;
//   multiply(sums, a, b, accumulate), static: a wgmma of 32 bytes of k;
//   results(i, half): the results of tile i as 16-bit elements, or 8-bit ones in their lower halves: those of the two
//       rows of x that a thread holds, times a weight row (or 8 below it), or with SwiGLU a gate and its up;
//   write_pack(row, column, end_column, from): writes 8 columns of y from shared memory, or only those before the end.
template <typename Consumer, typename Sum, int kRows>
class StreamConsumer {
 public:
  __device__ __forceinline__ StreamConsumer(const StreamBlock<kRows>& block, const StreamHopperArguments& arguments)
      : block_(block), p(arguments) {}

  // Sends the partial sums to the blocks that own their rows of x, and adds those of the others to the own ones. The
  // block has no further tile.
  __device__ __forceinline__ void exchange_sums() {
    if (!has_weight_rows()) return;
    send_sums();
    if (block_.owned_tiles() <= 0) return;
    mbarrier_wait(block_.received_barrier(), 0);
    add_received_sums();
  }

  // Writes the owned rows of y: transposed in shared memory, and stored in whole lines. Instructions that run once in a
  // block are fetched anew by each, so only what needs the accumulators is unrolled.
  __device__ __forceinline__ void write_tile(int tile, bool last) const {
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      if (owns(i) || owns(i + 1)) put_results(i);
    }
    warpgroup_sync(1 + group_);
    write_rows(tile);
    if (!last) warpgroup_sync(1 + group_);  // the next tile's results go to the same place
  }

 protected:
  static constexpr int kTiles = kRows / 8;

  // Adds the products of all chunks to sums_, which are 0 before.
  __device__ __forceinline__ void multiply_chunks() {
    start_chunk(sums_, true);
    for (int chunk = block_.first_chunk + 1; chunk < block_.end_chunk; ++chunk) {
      const int weight_stage = weight_state_.stage, x_stage = x_state_.stage;
      advance();
      start_chunk(sums_, true);
      wgmma_wait_group<1>();
      release(weight_stage, x_stage);
    }
    wgmma_wait_group<0>();
    release(weight_state_.stage, x_state_.stage);
    advance();
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = Sum{0};
  }

  // Issues a chunk's wgmmas as one group: sums = its products, or with `accumulate` sums += its products.
  __device__ __forceinline__ void start_chunk(Sum (&sums)[kTiles][4], bool accumulate) {
    const uint32_t weights = block_.weights(weight_state_.stage) + group_ * kWarpgroupRows * kSwizzleBytes;
    const uint32_t x = block_.x(x_state_.stage);
    mbarrier_wait(block_.weights_full(weight_state_.stage), weight_state_.parity);
    mbarrier_wait(block_.x_full(x_state_.stage), x_state_.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSwizzleBytes; k += 32) {
      Consumer::multiply(sums, matrix_descriptor(weights + k, 16), matrix_descriptor(x + k, 16), accumulate || k > 0);
    }
    wgmma_commit_group();
  }
  __device__ __forceinline__ void release(int weight_stage, int x_stage) const {
    if (threadIdx.x % kWarpgroupThreads != 0) return;
    mbarrier_arrive(block_.weights_empty(weight_stage));
    mbarrier_arrive(block_.x_empty(x_stage));
  }
  __device__ __forceinline__ void advance() {
    weight_state_.advance(p.weight_stages);
    x_state_.advance(p.x_stages);
  }

  __device__ __forceinline__ int first_column(int tile, int warp) const {
    const int row = block_.weight_row(tile) + 16 * warp;
    return p.swiglu ? row / 2 : row;
  }

  __device__ __forceinline__ void write_pack(int row, int column, int end_column, uint32_t from) const {
    uint16_t* const to = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(row) * p.columns + column;
    if (p.writes_packs) {
      float words[4];
      load_shared(words, from);
      *reinterpret_cast<float4*>(to) = make_float4(words[0], words[1], words[2], words[3]);
      return;
    }
#pragma unroll 1
    for (int i = 0; i < 8 && column + i < end_column; ++i) {
      to[i] = load_shared_16(from + 2 * i);
    }
  }

  const StreamBlock<kRows>& block_;
  const StreamHopperArguments& p;
  const int warp_ = static_cast<int>(threadIdx.x) / 32;
  const int group_ = warp_ / 4;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  PipelineState weight_state_, x_state_;
  Sum sums_[kTiles][4];

 private:
  __device__ __forceinline__ const Consumer& self() const { return *static_cast<const Consumer*>(this); }

  __device__ __forceinline__ void send_sums() const {
    int owner = 0, owned_tile = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (owner != block_.split) {
        const int distance = block_.split - owner + (block_.split < owner ? p.splits : 0);
        float words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) words[j] = bit_cast<float>(sums_[i][j]);
        store_async(map_to_block(block_.received(distance, owned_tile), owner),
                    map_to_block(block_.received_barrier(), owner), words);
      }
      if (++owned_tile == p.owned_tiles) {
        owned_tile = 0;
        ++owner;
      }
    }
  }
  __device__ __forceinline__ void add_received_sums() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!owns(i)) continue;
      for (int distance = 1; distance < p.splits; ++distance) {
        float more[4];
        load_shared(more, block_.received(distance, i - block_.first_owned_tile()));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums_[i][j] += bit_cast<Sum>(more[j]);
      }
    }
  }

  __device__ __forceinline__ bool owns(int tile) const {
    return tile < kTiles &&
           (p.splits == 1 || (tile >= block_.first_owned_tile() && tile < block_.end_of_owned_tiles()));
  }
  // Whether the 16 weight rows of this warp begin inside the tile.
  __device__ __forceinline__ bool has_weight_rows() const { return 16 * warp_ < p.tile_rows; }
  __device__ __forceinline__ uint32_t results(int i, int half) const {
    return i < kTiles ? self().results(i, half) : 0;
  }
  __device__ __forceinline__ uint32_t staging(int row, int chunk) const {
    return block_.staging + group_ * staging_bytes_of(kRows) + swizzled_offset(kRows, row, chunk);
  }
  // Stages tiles i and i + 1 of y as [row of x][column], in the 128-byte swizzle.
  __device__ __forceinline__ void put_results(int i) const {
    const int matrix = lane_ / 8;
    if (p.swiglu) {
      stmatrix_x2_trans(staging(8 * (i + matrix % 2) + lane_ % 8, warp_ % 4), results(i, 0), results(i + 1, 0));
    } else {
      const uint32_t matrices[4] = {results(i, 0), results(i, 1), results(i + 1, 0), results(i + 1, 1)};
      stmatrix_x4_trans(staging(8 * (i + matrix / 2) + lane_ % 8, 2 * (warp_ % 4) + matrix % 2), matrices);
    }
  }
  __device__ __forceinline__ void write_rows(int tile) const {
    const int end_weight_row = block_.weight_row(tile) + p.tile_rows;
    const int end_column = min(p.columns, p.swiglu ? end_weight_row / 2 : end_weight_row);
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const int chunk = thread % 8;
    const int column = first_column(tile, 4 * group_) + 8 * chunk;
    if (column >= end_column || (p.swiglu && chunk >= 4)) return;
    const int first_row = p.splits == 1 ? 0 : 8 * block_.first_owned_tile();
    const int end_row = min(p.splits == 1 ? kRows : 8 * block_.end_of_owned_tiles(), p.rows - block_.x_row(tile));
#pragma unroll 1
    for (int row = first_row + thread / 8; row < end_row; row += kWarpgroupThreads / 8) {
      self().write_pack(block_.x_row(tile) + row, column, end_column, staging(row, chunk));
    }
  }
};

// A consumer warpgroup of x, weight, bias and y of one type.
template <typename T, int kRows>
class SameTypeConsumer : public StreamConsumer<SameTypeConsumer<T, kRows>, float, kRows> {
  using Base = StreamConsumer<SameTypeConsumer<T, kRows>, float, kRows>;
  using Base::first_column, Base::lane_, Base::p, Base::sums_, Base::warp_;

 public:
  using Base::Base;

  __device__ __forceinline__ void multiply_tile(int tile) {
    load_bias(tile);
    this->clear_sums();
    this->multiply_chunks();
  }
  static __device__ __forceinline__ void multiply(float (&sums)[kRows / 8][4], uint64_t a, uint64_t b, bool) {
    wgmma<T>(sums, a, b);
  }
  __device__ __forceinline__ uint32_t results(int i, int half) const {
    const float (&z)[4] = sums_[i];
    if (p.swiglu) {
      return pack_pair<T>(silu<T>(z[0] + bias_[0]) * (z[2] + bias_[1]), silu<T>(z[1] + bias_[0]) * (z[3] + bias_[1]));
    }
    return pack_pair<T>(z[2 * half] + bias_[half], z[2 * half + 1] + bias_[half]);
  }

 private:
  __device__ __forceinline__ float bias_of(int column, bool is_up) const {
    if (p.bias == nullptr || column >= p.columns) return 0.0F;
    return to_float(static_cast<const T*>(p.bias)[column + (is_up ? p.columns : 0)]);
  }
  __device__ __forceinline__ void load_bias(int tile) {
    const int column = first_column(tile, warp_) + lane_ / 4;
    bias_[0] = bias_of(column, false);
    bias_[1] = bias_of(p.swiglu ? column : column + 8, p.swiglu);
  }

  float bias_[2];
};

// A kernel's body.
template <typename Consumer, int kRows, typename Arguments>
__device__ __forceinline__ void stream_gemm(const Arguments& p) {
  trigger_dependent_launch();
  extern __shared__ char shared[];
  const StreamBlock<kRows> block(p, shared_address(shared));
  const int warp = static_cast<int>(threadIdx.x) / 32 - 4 * block.groups;  // 0 and more: producers
  const bool is_first_lane = threadIdx.x % 32 == 0;
  WeightProducer<kRows> weights(block);
  if (warp == 0 && is_first_lane) {
    prefetch_tensor_map(p.weight);
    const int first_stages = min(kFirstStages, p.weight_stages);
    block.init_weight_barriers(0, first_stages);
    if (!p.constant_weight) wait_for_previous_kernel();
    weights.load_first(first_stages);
    block.init_weight_barriers(first_stages, p.weight_stages);
  } else if (warp == 1 && is_first_lane) {
    prefetch_tensor_map(p.x);
    block.init_other_barriers();
  }
  __syncthreads();
  if (p.splits > 1) cluster_arrive();
  if (warp == 0 && is_first_lane) {
    weights.load_the_rest();
  } else if (warp == 1 && is_first_lane) {
    wait_for_previous_kernel();
    produce_x(block);
  }
  __syncwarp();
  if (p.splits > 1) cluster_wait();  // the other blocks' mbarriers are initialised
  if (warp >= 0) return;
  wait_for_previous_kernel();
  Consumer consumer(block, p);
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step) {
    consumer.multiply_tile(tile);
    if (p.splits > 1) consumer.exchange_sums();  // then a block has one tile
    consumer.write_tile(tile, tile + block.tile_step >= p.tiles);
  }
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kWarpgroupThreads* max_warpgroups_of(kRows) + 32 * kProducerWarps, 1)
    gemm_hopper(const __grid_constant__ StreamHopperArguments p) {
  stream_gemm<SameTypeConsumer<T, kRows>, kRows>(p);
}

}  // namespace qwen_plugins
