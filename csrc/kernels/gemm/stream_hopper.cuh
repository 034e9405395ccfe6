// The streaming GEMM for tens of rows on Hopper: reads the weight once, at the speed of memory.
//
// A warp-specialised persistent kernel. The weight's rows are wgmma's operand a, 64 for each consumer warpgroup, rows
// of x are operand b. The producer warp issues TMA loads into a ring buffer of pipeline stages, which runs on from tile
// to tile; a stage is kBlockK elements of k of a tile of weight rows and of all rows of x.
//
// Where there are fewer tiles than multiprocessors the blocks of a cluster split k (split-K): each owns some rows of x,
// sends its partial sums of the others to their owners through distributed shared memory, and adds what it receives,
// always in the same order.
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

constexpr int kWarpgroupRows = 64;                                    // weight rows of a warpgroup
constexpr int kWarpgroupStageBytes = kWarpgroupRows * kSwizzleBytes;  // of these rows, in a stage
constexpr int kMaxStages = 32;
constexpr int kMaxWarpgroups = 3;  // consumers of a block
constexpr int kBarrierBytes = (2 * kMaxStages + 1) * 8;
// The mbarriers, and what aligns the ring buffer to 1024 bytes.
constexpr int kSharedOverheadBytes = divide_up(kBarrierBytes, 1024) * 1024 + 1024;

struct StreamHopperArguments {
  CUtensorMap weight;  // with SwiGLU a box alternates 8 gate rows and the 8 up rows that belong to them
  CUtensorMap x;
  const void* bias;
  void* y;
  int32_t columns;  // of y
  int32_t rows;     // of x
  int32_t chunks;   // of kBlockK elements of k
  int32_t tiles;    // of the weight rows of all warpgroups of a block
  int32_t stages;
  bool swiglu;
  bool constant_weight;
};

// Bytes of a pipeline stage, for kRows rows of x.
template <int kRows>
constexpr int stage_bytes_of(int groups) {
  return groups * kWarpgroupStageBytes + kRows * kSwizzleBytes;
}
// Tiles of 8 rows of x that a block of a cluster owns, the last ones fewer.
template <int kRows>
__host__ __device__ constexpr int owned_tiles_of(int splits) {
  return divide_up(kRows / 8, splits);
}
// Bytes of shared memory for the partial sums that a block of a cluster receives.
template <int kRows>
constexpr int received_bytes_of(int groups, int splits) {
  return (splits - 1) * owned_tiles_of<kRows>(splits) * groups * kWarpgroupThreads * 16;
}

// A block's part of the GEMM, and the layout of its shared memory.
template <int kRows>
struct StreamBlock {
  const StreamHopperArguments& p;
  const int groups = static_cast<int>(blockDim.x) / kWarpgroupThreads;  // consumer warpgroups
  const int splits = cluster_num_blocks();
  const int rank = cluster_block_rank();
  const int first_tile = static_cast<int>(blockIdx.x) / splits;
  const int tile_step = static_cast<int>(gridDim.x) / splits;
  const int first_chunk = p.chunks * rank / splits;
  const int end_chunk = p.chunks * (rank + 1) / splits;
  const uint32_t barriers;
  const uint32_t ring = (barriers + kBarrierBytes + 1023) / 1024 * 1024;
  const int stage_bytes = groups * kWarpgroupStageBytes + kRows * kSwizzleBytes;

  __device__ __forceinline__ StreamBlock(const StreamHopperArguments& arguments, uint32_t shared)
      : p(arguments), barriers(shared) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ __forceinline__ uint32_t received_barrier() const { return barriers + 16 * kMaxStages; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return ring + stage * stage_bytes; }
  __device__ __forceinline__ uint32_t x(int stage) const { return weights(stage) + groups * kWarpgroupStageBytes; }

  // Where the block `distance` ranks ahead sends its partial sums of one owned tile of 8 rows, 16 bytes a thread.
  __device__ __forceinline__ uint32_t received(int distance, int owned_tile) const {
    const int index = (distance - 1) * owned_tiles_of<kRows>(splits) + owned_tile;
    return ring + p.stages * stage_bytes + (index * groups * kWarpgroupThreads + static_cast<int>(threadIdx.x)) * 16;
  }
  __device__ __forceinline__ int first_owned_tile() const { return rank * owned_tiles_of<kRows>(splits); }
  __device__ __forceinline__ int end_of_owned_tiles() const {
    return min(kRows / 8, first_owned_tile() + owned_tiles_of<kRows>(splits));
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < p.stages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), groups);
    }
    mbarrier_init(received_barrier(), 1);
    fence_mbarrier_init();
    const int owned = max(0, end_of_owned_tiles() - first_owned_tile());
    mbarrier_arrive_expect_tx(received_barrier(), (splits - 1) * owned * groups * kWarpgroupThreads * 16);
  }
};

// The producer thread: loads all chunks of the block, tile after tile, as many stages ahead as the ring buffer has.
template <int kRows>
class StreamProducer {
 public:
  __device__ __forceinline__ explicit StreamProducer(const StreamBlock<kRows>& block)
      : block_(block),
        weight_{block.first_tile, block.first_chunk},
        weight_policy_(evict_first_policy()),
        x_policy_(evict_last_policy()) {}

  // Load the weights of the first stages, and, after wait_for_previous_kernel(), their x.
  __device__ __forceinline__ void load_first_weights() {
    for (int stage = 0; stage < block_.p.stages && weight_.tile < block_.p.tiles; ++stage) {
      load_weight(stage);
      advance(weight_);
    }
  }
  __device__ __forceinline__ void load_first_x() const {
    Position x{block_.first_tile, block_.first_chunk};
    for (int stage = 0; stage < block_.p.stages && x.tile < block_.p.tiles; ++stage, advance(x)) load_x(stage, x);
  }
  __device__ __forceinline__ void load_the_rest() {
    for (PipelineState state; weight_.tile < block_.p.tiles; state.advance(block_.p.stages), advance(weight_)) {
      mbarrier_wait(block_.empty(state.stage), state.parity);
      load_weight(state.stage);
      load_x(state.stage, weight_);
    }
  }

 private:
  struct Position {
    int tile, chunk;
  };

  __device__ __forceinline__ void advance(Position& position) const {
    if (++position.chunk < block_.end_chunk) return;
    position.chunk = block_.first_chunk;
    position.tile += block_.tile_step;
  }
  // Also expects the bytes of x.
  __device__ __forceinline__ void load_weight(int stage) const {
    mbarrier_arrive_expect_tx(block_.full(stage), block_.stage_bytes);
    const int row = weight_.tile * block_.groups * kWarpgroupRows;
    const bool swiglu = block_.p.swiglu;  // coordinates: encode_weight_tensor_map
    tma_load_4d(block_.weights(stage), block_.p.weight, block_.full(stage), weight_policy_, weight_.chunk * kBlockK,
                swiglu ? 0 : row, 0, swiglu ? row / 16 : 0);
  }
  __device__ __forceinline__ void load_x(int stage, const Position& position) const {
    tma_load_2d(block_.x(stage), block_.p.x, block_.full(stage), x_policy_, position.chunk * kBlockK, 0);
  }

  const StreamBlock<kRows>& block_;
  Position weight_;
  const uint64_t weight_policy_, x_policy_;
};

// A consumer warpgroup. A thread accumulates two weight rows (with SwiGLU a gate row and its up row) times two rows of
// every tile of 8 rows of x.
template <typename T, int kRows>
class StreamConsumer {
 public:
  __device__ __forceinline__ explicit StreamConsumer(const StreamBlock<kRows>& block) : block_(block), p(block.p) {}

  // Multiplies a tile, and keeps its last stage for finish_tile, which transposes the results there.
  __device__ __forceinline__ void multiply_tile() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    for (int chunk = block_.first_chunk; chunk < block_.end_chunk; ++chunk) {
      if (chunk > block_.first_chunk) release_stage();
      mbarrier_wait(block_.full(state_.stage), state_.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kBlockK * 2; k += 32) {
        wgmma<T>(sums_, matrix_descriptor(own_weights() + k, 16), matrix_descriptor(block_.x(state_.stage) + k, 16));
      }
      wgmma_commit_group();
      wgmma_wait_group<0>();
    }
  }

  // Sends partial sums to the blocks that own their rows of x.
  __device__ __forceinline__ void send_sums() const {
    int owner = 0, owned_tile = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (owner != block_.rank) {
        const int distance = block_.rank - owner + (block_.rank < owner ? block_.splits : 0);
        store_async(map_to_block(block_.received(distance, owned_tile), owner),
                    map_to_block(block_.received_barrier(), owner), sums_[i]);
      }
      if (++owned_tile == owned_tiles_of<kRows>(block_.splits)) {
        owned_tile = 0;
        ++owner;
      }
    }
  }
  __device__ __forceinline__ void receive_sums() {
    mbarrier_wait(block_.received_barrier(), 0);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!owns(i)) continue;
      for (int distance = 1; distance < block_.splits; ++distance) {
        float more[4];
        load_shared(more, block_.received(distance, i - block_.first_owned_tile()));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums_[i][j] += more[j];
      }
    }
  }

  // Writes the owned rows of y by way of the last stage, in place of the weights that this warpgroup multiplied.
  __device__ __forceinline__ void finish_tile(int tile) {
    const uint32_t staging = own_weights();
    warpgroup_sync(1 + group_);  // all four warps have multiplied what is overwritten
    put_results(tile, staging);
    warpgroup_sync(1 + group_);
    write_results(tile, staging);
    fence_proxy_async();  // TMA writes there next
    warpgroup_sync(1 + group_);
    release_stage();
  }

 private:
  static constexpr int kTiles = kRows / 8;

  static __device__ __forceinline__ void load_shared(float (&values)[4], uint32_t from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "r"(from)
                 : "memory");
  }

  __device__ __forceinline__ bool owns(int tile) const {
    return tile >= block_.first_owned_tile() && tile < block_.end_of_owned_tiles();
  }
  __device__ __forceinline__ uint32_t own_weights() const {
    return block_.weights(state_.stage) + group_ * kWarpgroupStageBytes;
  }
  __device__ __forceinline__ void release_stage() {
    if (threadIdx.x % kWarpgroupThreads == 0) mbarrier_arrive(block_.empty(state_.stage));
    state_.advance(p.stages);
  }
  __device__ __forceinline__ int columns_of_group() const { return p.swiglu ? kWarpgroupRows / 2 : kWarpgroupRows; }
  __device__ __forceinline__ int first_column(int tile) const {
    return (tile * block_.groups + group_) * columns_of_group();
  }

  __device__ __forceinline__ float bias_of(int column, bool is_up) const {
    if (p.bias == nullptr || column >= p.columns) return 0.0F;
    return to_float(static_cast<const T*>(p.bias)[column + (is_up ? p.columns : 0)]);
  }
  // Stages y in shared memory as [row of x][column], in the 128-byte swizzle.
  __device__ __forceinline__ void put_results(int tile, uint32_t staging) const {
    const int columns_of_warp = columns_of_group() / 4;
    const int column = first_column(tile) + warp_ * columns_of_warp + lane_ / 4;
    const float bias[2] = {bias_of(column, false), bias_of(p.swiglu ? column : column + 8, p.swiglu)};
    const int chunk = warp_ * columns_of_warp / 8 + (p.swiglu ? 0 : lane_ / 8 % 2);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!owns(i)) continue;
      const float (&z)[4] = sums_[i];
      const uint32_t to = staging + swizzled_offset(kRows, 8 * i + lane_ % 8, chunk);
      if (p.swiglu) {
        const float y0 = silu<T>(z[0] + bias[0]) * (z[2] + bias[1]);
        const float y1 = silu<T>(z[1] + bias[0]) * (z[3] + bias[1]);
        stmatrix_x1_trans(to, pack_pair<T>(y0, y1));
      } else {
        stmatrix_x2_trans(to, pack_pair<T>(z[0] + bias[0], z[1] + bias[0]),
                          pack_pair<T>(z[2] + bias[1], z[3] + bias[1]));
      }
    }
  }
  __device__ __forceinline__ void write_results(int tile, uint32_t staging) const {
    const int chunks = columns_of_group() / 8;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const int chunk = thread % chunks;
    const int column = first_column(tile) + 8 * chunk;
    if (column >= p.columns) return;
    const int end_row = min(p.rows, 8 * block_.end_of_owned_tiles());
    for (int row = 8 * block_.first_owned_tile() + thread / chunks; row < end_row; row += kWarpgroupThreads / chunks) {
      float words[4];
      load_shared(words, staging + swizzled_offset(kRows, row, chunk));
      *reinterpret_cast<float4*>(static_cast<T*>(p.y) + static_cast<int64_t>(row) * p.columns + column) =
          make_float4(words[0], words[1], words[2], words[3]);
    }
  }

  const StreamBlock<kRows>& block_;
  const StreamHopperArguments& p;
  const int group_ = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  const int warp_ = static_cast<int>(threadIdx.x) / 32 % 4;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  PipelineState state_;
  float sums_[kTiles][4];
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kWarpgroupThreads* kMaxWarpgroups + 32, 1)
    gemm_hopper(const __grid_constant__ StreamHopperArguments p) {
  trigger_dependent_launch();
  extern __shared__ char shared[];
  const StreamBlock<kRows> block(p, shared_address(shared));
  StreamProducer<kRows> producer(block);
  const int first_producer_thread = kWarpgroupThreads * block.groups;
  const bool is_producer = static_cast<int>(threadIdx.x) == first_producer_thread;
  if (is_producer) {
    prefetch_tensor_map(p.weight);
    prefetch_tensor_map(p.x);
    block.init_barriers();
    if (!p.constant_weight) wait_for_previous_kernel();
    producer.load_first_weights();
  }
  __syncthreads();
  if (block.splits > 1) cluster_arrive();
  wait_for_previous_kernel();
  if (static_cast<int>(threadIdx.x) >= first_producer_thread) {
    if (is_producer) {
      producer.load_first_x();
      producer.load_the_rest();
    }
    __syncwarp();
    if (block.splits > 1) cluster_wait();
    return;
  }
  StreamConsumer<T, kRows> consumer(block);
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step) {
    consumer.multiply_tile();
    if (block.splits > 1) {  // then a block has one tile
      cluster_wait();
      consumer.send_sums();
      consumer.receive_sums();
    }
    consumer.finish_tile(tile);
  }
}

}  // namespace qwen_plugins
