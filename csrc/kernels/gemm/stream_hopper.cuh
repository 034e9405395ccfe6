// The kernel for tens of rows on Hopper.
//
// The weight's rows are the first operand of wgmma, 64 for each group of four warps, rows of x the second. One more
// warp keeps the copy engine busy: it fills a ring of stages, each a chunk of k of a block's tile of weight rows and of
// all rows of x, which runs on from tile to tile.
//
// Where there are fewer tiles than multiprocessors, the blocks of a cluster split k. Each owns some rows of x, sends
// its sums of the others to their owners and adds what it receives, always in the same order.
//
// As gemm_stream, one block for each multiprocessor, launched while the kernel before it runs: it fills its ring with
// weights and only then waits, because of x.
#pragma once

#include <cuda.h>

#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "silu.cuh"

namespace qwen_plugins {

constexpr int kHopperTileRows = 64;                                 // weight rows of a group of four warps
constexpr int kHopperTileBytes = kHopperTileRows * kPanelRowBytes;  // a chunk of them
constexpr int kMaxHopperStages = 32;
constexpr int kMaxHopperGroups = 3;  // of four warps, in a block
constexpr int kHopperBarrierBytes = (2 * kMaxHopperStages + 1) * 8;
constexpr int kHopperSharedOverhead = (kHopperBarrierBytes + 1023) / 1024 * 1024 + 1024;  // the ring begins at 1024

struct HopperArguments {
  CUtensorMap weight;  // with SwiGLU 8 gate rows and the 8 up rows that belong to them in turns
  CUtensorMap x;
  const void* bias;
  void* y;
  int32_t columns;  // of y
  int32_t rows;     // of x
  int32_t chunks;   // of k
  int32_t tiles;    // of weight rows, each of all warps of a block
  int32_t stages;
  bool swiglu;
  bool constant_weight;
};

// Bytes of shared memory, for kRows rows of x: of a stage, and of the sums that a block of a cluster receives.
template <int kRows>
constexpr int hopper_stage_bytes(int groups) {
  return groups * kHopperTileBytes + kRows * kPanelRowBytes;
}
// Tiles of 8 rows of x that a block of a cluster owns, the last ones fewer.
template <int kRows>
__host__ __device__ constexpr int hopper_owned_tiles(int splits) {
  return (kRows / 8 + splits - 1) / splits;
}
template <int kRows>
constexpr int hopper_received_bytes(int groups, int splits) {
  return (splits - 1) * hopper_owned_tiles<kRows>(splits) * groups * 128 * 16;
}

// A block's part of the product, and where things are in its shared memory.
template <int kRows>
struct HopperBlock {
  const HopperArguments& p;
  const int groups = static_cast<int>(blockDim.x) / 128;
  const int splits = blocks_of_cluster();
  const int rank = rank_in_cluster();
  const int first_tile = static_cast<int>(blockIdx.x) / splits;
  const int tile_step = static_cast<int>(gridDim.x) / splits;
  const int first_chunk = p.chunks * rank / splits;
  const int end_chunk = p.chunks * (rank + 1) / splits;
  const uint32_t barriers;
  const uint32_t ring = (barriers + kHopperBarrierBytes + 1023) / 1024 * 1024;
  const int stage_bytes = groups * kHopperTileBytes + kRows * kPanelRowBytes;

  __device__ __forceinline__ HopperBlock(const HopperArguments& arguments, uint32_t shared)
      : p(arguments), barriers(shared) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ __forceinline__ uint32_t received_barrier() const { return barriers + 16 * kMaxHopperStages; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return ring + stage * stage_bytes; }
  __device__ __forceinline__ uint32_t x(int stage) const { return weights(stage) + groups * kHopperTileBytes; }

  // Where the sums of one owned tile of 8 rows are that the block `distance` ranks ahead sends, 16 bytes a thread.
  __device__ __forceinline__ uint32_t received(int distance, int owned_tile) const {
    const int index = (distance - 1) * hopper_owned_tiles<kRows>(splits) + owned_tile;
    return ring + p.stages * stage_bytes + (index * groups * 128 + static_cast<int>(threadIdx.x)) * 16;
  }
  __device__ __forceinline__ int first_owned_tile() const { return rank * hopper_owned_tiles<kRows>(splits); }
  __device__ __forceinline__ int end_of_owned_tiles() const {
    return min(kRows / 8, first_owned_tile() + hopper_owned_tiles<kRows>(splits));
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < p.stages; ++stage) {
      init_barrier(full(stage), 1);
      init_barrier(empty(stage), groups);
    }
    init_barrier(received_barrier(), 1);
    publish_barriers();
    const int owned = max(0, end_of_owned_tiles() - first_owned_tile());
    arrive_and_expect(received_barrier(), (splits - 1) * owned * groups * 128 * 16);
  }
};

// What the copying thread does: all chunks of the block, tile after tile, as far ahead as the ring is long.
template <int kRows>
class HopperCopies {
 public:
  __device__ __forceinline__ explicit HopperCopies(const HopperBlock<kRows>& block)
      : block_(block),
        weight_{block.first_tile, block.first_chunk},
        once_(policy_of_what_is_read_once()),
        by_all_(policy_of_what_all_blocks_read()) {}

  // The weights of the first stages, and after wait_for_previous_kernel the x that goes with them.
  __device__ __forceinline__ void begin_weights() {
    for (int stage = 0; stage < block_.p.stages && weight_.tile < block_.p.tiles; ++stage) {
      copy_weight(stage);
      advance(weight_);
    }
  }
  __device__ __forceinline__ void begin_x() const {
    Position x{block_.first_tile, block_.first_chunk};
    for (int stage = 0; stage < block_.p.stages && x.tile < block_.p.tiles; ++stage, advance(x)) copy_x(stage, x);
  }
  __device__ __forceinline__ void copy_the_rest() {
    for (StageCursor cursor; weight_.tile < block_.p.tiles; cursor.advance(block_.p.stages), advance(weight_)) {
      wait_for_phase(block_.empty(cursor.stage), cursor.parity);
      copy_weight(cursor.stage);
      copy_x(cursor.stage, weight_);
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
  __device__ __forceinline__ void copy_weight(int stage) const {
    arrive_and_expect(block_.full(stage), block_.stage_bytes);
    const int row = weight_.tile * block_.groups * kHopperTileRows;
    const bool swiglu = block_.p.swiglu;  // then the coordinates are k, gate row of 8, gate or up, 8 gate rows
    copy_box(block_.weights(stage), block_.p.weight, block_.full(stage), once_, weight_.chunk * kHopperChunk,
             swiglu ? 0 : row, 0, swiglu ? row / 16 : 0);
  }
  __device__ __forceinline__ void copy_x(int stage, const Position& position) const {
    copy_box(block_.x(stage), block_.p.x, block_.full(stage), by_all_, position.chunk * kHopperChunk, 0);
  }

  const HopperBlock<kRows>& block_;
  Position weight_;
  const uint64_t once_, by_all_;
};

// What four warps that multiply together do. A thread has the sums of two weight rows, in every tile of 8 rows of x of
// two of these; with SwiGLU they are a gate row and its up row.
template <typename T, int kRows>
class HopperProducts {
 public:
  __device__ __forceinline__ explicit HopperProducts(const HopperBlock<kRows>& block) : block_(block), p(block.p) {}

  // Leaves the tile's last stage to finish_tile: it is where the results are put in order.
  __device__ __forceinline__ void multiply_tile() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    for (int chunk = block_.first_chunk; chunk < block_.end_chunk; ++chunk) {
      if (chunk > block_.first_chunk) release_stage();
      wait_for_phase(block_.full(cursor_.stage), cursor_.parity);
      begin_products();
#pragma unroll
      for (int k = 0; k < kHopperChunk * 2; k += 32) {
        multiply_async<T>(sums_, operand(own_weights() + k, 16), operand(block_.x(cursor_.stage) + k, 16));
      }
      commit_products();
      wait_for_products<0>();
    }
  }

  // Sends sums to the blocks that own their rows of x.
  __device__ __forceinline__ void send_sums() const {
    int owner = 0, owned_tile = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (owner != block_.rank) {
        const int distance = block_.rank - owner + (block_.rank < owner ? block_.splits : 0);
        send_to_block(owner, block_.received(distance, owned_tile), block_.received_barrier(), sums_[i]);
      }
      if (++owned_tile == hopper_owned_tiles<kRows>(block_.splits)) {
        owned_tile = 0;
        ++owner;
      }
    }
  }
  __device__ __forceinline__ void receive_sums() {
    wait_for_phase(block_.received_barrier(), 0);
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

  // Writes the owned rows of y, through the weights of the last stage that these warps multiplied.
  __device__ __forceinline__ void finish_tile(int tile) {
    const uint32_t staging = own_weights();
    synchronise_four_warps(1 + group_);  // all four have multiplied what is overwritten
    put_results(tile, staging);
    synchronise_four_warps(1 + group_);
    write_results(tile, staging);
    publish_to_products();  // the copy engine writes there next
    synchronise_four_warps(1 + group_);
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
    return block_.weights(cursor_.stage) + group_ * kHopperTileBytes;
  }
  __device__ __forceinline__ void release_stage() {
    if (threadIdx.x % 128 == 0) arrive(block_.empty(cursor_.stage));
    cursor_.advance(p.stages);
  }
  __device__ __forceinline__ int columns_of_group() const { return p.swiglu ? kHopperTileRows / 2 : kHopperTileRows; }
  __device__ __forceinline__ int first_column(int tile) const {
    return (tile * block_.groups + group_) * columns_of_group();
  }

  __device__ __forceinline__ float bias_of(int column, bool is_up) const {
    if (p.bias == nullptr || column >= p.columns) return 0.0F;
    return to_float(static_cast<const T*>(p.bias)[column + (is_up ? p.columns : 0)]);
  }
  // y as [row of x][column], chunks of 8 columns in the order of the 128-byte swizzle.
  __device__ __forceinline__ void put_results(int tile, uint32_t staging) const {
    const int columns_of_warp = columns_of_group() / 4;
    const int column = first_column(tile) + warp_ * columns_of_warp + lane_ / 4;
    const float bias[2] = {bias_of(column, false), bias_of(p.swiglu ? column : column + 8, p.swiglu)};
    const int chunk = warp_ * columns_of_warp / 8 + (p.swiglu ? 0 : lane_ / 8 % 2);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!owns(i)) continue;
      const float (&z)[4] = sums_[i];
      const uint32_t to = staging + chunk_offset(kRows, 8 * i + lane_ % 8, chunk);
      if (p.swiglu) {
        const float y0 = silu<T>(z[0] + bias[0]) * (z[2] + bias[1]);
        const float y1 = silu<T>(z[1] + bias[0]) * (z[3] + bias[1]);
        store_transposed(to, pack_pair<T>(y0, y1));
      } else {
        store_transposed(to, pack_pair<T>(z[0] + bias[0], z[1] + bias[0]),
                         pack_pair<T>(z[2] + bias[1], z[3] + bias[1]));
      }
    }
  }
  __device__ __forceinline__ void write_results(int tile, uint32_t staging) const {
    const int chunks = columns_of_group() / 8;
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const int chunk = thread % chunks;
    const int column = first_column(tile) + 8 * chunk;
    if (column >= p.columns) return;
    const int end_row = min(p.rows, 8 * block_.end_of_owned_tiles());
    for (int row = 8 * block_.first_owned_tile() + thread / chunks; row < end_row; row += 128 / chunks) {
      float words[4];
      load_shared(words, staging + chunk_offset(kRows, row, chunk));
      *reinterpret_cast<float4*>(static_cast<T*>(p.y) + static_cast<int64_t>(row) * p.columns + column) =
          make_float4(words[0], words[1], words[2], words[3]);
    }
  }

  const HopperBlock<kRows>& block_;
  const HopperArguments& p;
  const int group_ = static_cast<int>(threadIdx.x) / 128;
  const int warp_ = static_cast<int>(threadIdx.x) / 32 % 4;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  StageCursor cursor_;
  float sums_[kTiles][4];
};

template <typename T, int kRows>
__global__ void __launch_bounds__(128 * kMaxHopperGroups + 32, 1)
    gemm_hopper(const __grid_constant__ HopperArguments p) {
  trigger_dependent_launch();
  extern __shared__ char shared[];
  const HopperBlock<kRows> block(p, shared_address(shared));
  HopperCopies<kRows> copies(block);
  const bool copies_now = static_cast<int>(threadIdx.x) == 128 * block.groups;
  if (copies_now) {
    prefetch_description(p.weight);
    prefetch_description(p.x);
    block.init_barriers();
    if (!p.constant_weight) wait_for_previous_kernel();
    copies.begin_weights();
  }
  __syncthreads();
  if (block.splits > 1) arrive_in_cluster();
  wait_for_previous_kernel();
  if (static_cast<int>(threadIdx.x) >= 128 * block.groups) {
    if (copies_now) {
      copies.begin_x();
      copies.copy_the_rest();
    }
    __syncwarp();
    if (block.splits > 1) wait_for_cluster();
    return;
  }
  HopperProducts<T, kRows> products(block);
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step) {
    products.multiply_tile();
    if (block.splits > 1) {  // then there is one tile for each block
      wait_for_cluster();
      products.send_sums();
      products.receive_sums();
    }
    products.finish_tile(tile);
  }
}

}  // namespace qwen_plugins
