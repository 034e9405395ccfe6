// The GEMM for tens of rows and more with int4 and int8 weights on Hopper: y^T = weight · x^T.
//
// A warp-specialised persistent kernel, one block for each multiprocessor. A block computes a tile of 128 weight rows
// times 128 or 256 rows of x at a time. Its producer warpgroups fill a ring buffer of pipeline stages, kBlockK elements
// of k each, which runs on from tile to tile: x by TMA, and the weights dequantized, as wgmma's operand a lies in
// shared memory. Its consumer warpgroups, of 64 weight rows each, only multiply, as those of a 16-bit GEMM. The two
// blocks of a cluster have the same rows of x, of which each loads half and multicasts it to both. Launched while the
// previous kernel runs, as gemm_stream.
//
// Shares. The chunks of k of all tiles, tile after tile, are divided into equal shares, one or several for a cluster,
// and a share may begin and end within a tile. Clusters work through their shares backwards: what they have of a tile
// that others finish comes first, and its sums go through the workspace. Who has a tile's end waits for these, adds
// them in a fixed order, and stores the results. With as many shares as tiles there is nothing to add.
#pragma once

#include <cuda.h>

#include "dequantize.cuh"
#include "hopper_operands.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/common/wgmma.cuh"
#include "packed_weight.h"
#include "silu.cuh"
#include "tile_order.cuh"

namespace qwen_plugins {

constexpr int kQuantizedCluster = 2;    // blocks, with the same rows of x
constexpr int kQuantizedGroups = 2;     // consumer warpgroups of a block
constexpr int kQuantizedWeights = 128;  // weight rows of a tile
static_assert(kPackedK == 2 * kBlockK);

// The producer warpgroups of a block: with few rows of x there are few products for each weight that is dequantized.
// The sums of 256 rows leave registers for one.
constexpr int quantized_producers(int tile_rows) { return tile_rows == 256 ? 1 : 2; }
constexpr int quantized_tiles_threads(int tile_rows) {
  return kWarpgroupThreads * (kQuantizedGroups + quantized_producers(tile_rows));
}

// Results of 64 rows of x and a warpgroup's columns of y are stored at a time, while the next are made.
constexpr int kQuantizedStoreRows = 64;
constexpr int kQuantizedStoreBytes = kQuantizedStoreRows * kSwizzleBytes;
constexpr int kQuantizedStoreBuffers = 2;

// The layout of shared memory: the ring buffer, the results to be stored, the mbarriers. A stage has the weights and x.
template <int kRows>
struct QuantizedTilesLayout {
  static constexpr int kWeightBytes = kQuantizedWeights * kSwizzleBytes;
  static constexpr int kXBytes = kRows * kSwizzleBytes;
  static constexpr int kStageBytes = kWeightBytes + kXBytes;
  static constexpr int kGroupResultBytes = kQuantizedStoreBuffers * kQuantizedStoreBytes;
  static constexpr int kResultBytes = kQuantizedGroups * kGroupResultBytes;
  static constexpr int kMaxBytes = 232448;  // what a block can have on Hopper
  static constexpr int kStages = (kMaxBytes - kResultBytes) / (kStageBytes + 16);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kBytes = kRingBytes + kResultBytes + 16 * kStages;
};

struct QuantizedTilesArguments {
  CUtensorMap x;  // boxes of half of the rows of a tile
  CUtensorMap y;  // boxes of kQuantizedStoreRows rows and a warpgroup's columns
  const uint32_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // null: none
  const void* bias;
  float4* sums;          // of shares that do not end a tile
  uint64_t* sums_done;   // for each of these, and each warpgroup: `launch` while they wait to be added
  uint64_t launch;       // a number that the workspace does not have by chance
  int32_t columns;       // of y
  int32_t chunks;        // of kPackedK elements of k, which are two stages
  int32_t group_shift;   // 32 << group_shift columns of k have one group of scales; 31: all
  int32_t weight_rows;   // padded: from one group's scales to the next
  int32_t row_tiles;     // each of kRows rows of x
  int32_t weight_tiles;  // each of the weight rows of the tiles of all blocks of a cluster
  int32_t shares;
  bool swiglu;  // half of a tile's weight rows are gate rows, the others their up rows
  bool constant_weight;
};

// Chunks of one tile of a cluster: a share's, or a part of it.
struct QuantizedPart {
  int tile;
  int first_chunk;
  int chunks;
  int share;
};

// The first chunk of a share, counted over all tiles.
__device__ __forceinline__ int64_t first_chunk_of_share(const QuantizedTilesArguments& p, int share) {
  return static_cast<int64_t>(p.row_tiles) * p.weight_tiles * p.chunks * share / p.shares;
}

// The parts that a cluster multiplies: share after share, but the parts of a share from the last to the first. So those
// that others wait for come first, and a cluster waits only for shares before its own.
class QuantizedParts {
 public:
  __device__ __forceinline__ explicit QuantizedParts(const QuantizedTilesArguments& p)
      : p_(p), share_(cluster_index()) {
    begin_share();
  }
  __device__ __forceinline__ bool done() const { return share_ >= p_.shares; }
  __device__ __forceinline__ const QuantizedPart& part() const { return part_; }
  __device__ __forceinline__ void advance() {
    if (left_ > 0) {
      --part_.tile;
      begin_part(p_.chunks);
    } else {
      share_ += num_clusters();
      begin_share();
    }
  }

 private:
  __device__ __forceinline__ void begin_share() {
    if (done()) return;
    const int64_t end = first_chunk_of_share(p_, share_ + 1);
    left_ = static_cast<int>(end - first_chunk_of_share(p_, share_));
    part_.share = share_;
    part_.tile = static_cast<int>((end - 1) / p_.chunks);
    begin_part(static_cast<int>(end - static_cast<int64_t>(part_.tile) * p_.chunks));
  }
  // The part of the share that ends before chunk `end` of its tile.
  __device__ __forceinline__ void begin_part(int end) {
    part_.chunks = min(left_, end);
    part_.first_chunk = end - part_.chunks;
    left_ -= part_.chunks;
  }

  const QuantizedTilesArguments& p_;
  int share_;
  int left_ = 0;  // chunks of the share before the part
  QuantizedPart part_{};
};

// The rows of a block's tile.
struct QuantizedTile {
  int row_tile, weight_tile;  // weight_tile: of a block, not of a cluster

  __device__ __forceinline__ QuantizedTile(const QuantizedTilesArguments& p, int index, int rank) {
    const TilePlace place(index, p.row_tiles, p.weight_tiles, 8);
    row_tile = place.row_tile;
    weight_tile = place.column_tile * kQuantizedCluster + rank;
  }
};

// A block's place in its cluster, and the addresses in its shared memory.
template <int kRows>
struct QuantizedTilesBlock {
  using Layout = QuantizedTilesLayout<kRows>;
  const QuantizedTilesArguments& p;
  const uint32_t ring;  // at a multiple of 1024
  const uint32_t results = ring + Layout::kRingBytes;
  const uint32_t barriers = results + Layout::kResultBytes;
  const int rank = cluster_block_rank();

  __device__ __forceinline__ QuantizedTilesBlock(const QuantizedTilesArguments& arguments, uint32_t shared)
      : p(arguments), ring(shared) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return ring + stage * Layout::kStageBytes; }
  __device__ __forceinline__ uint32_t x(int stage) const { return weights(stage) + Layout::kWeightBytes; }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < Layout::kStages; ++stage) {
      mbarrier_init(full(stage), 1 + kWarpgroupThreads / 32);  // x, and the warps that dequantize
      mbarrier_init(empty(stage), kQuantizedGroups * kQuantizedCluster);
    }
    fence_mbarrier_init();
  }
  // A barrier of all threads of the cluster: a block may write to the other's shared memory only after the other has
  // initialised its mbarriers, and while it still runs.
  __device__ __forceinline__ void sync_cluster() const {
    cluster_arrive();
    cluster_wait();
  }
};

// A producer warpgroup; of several each makes every kProducers-th chunk. Each warp dequantizes two blocks of 16 weight
// rows, and all take turns to load x. Codes and scales go from global memory into registers, kAhead chunks ahead; the
// ring buffer hides what that does not. A lane's codes are the fragments that it stores with stmatrix.
template <typename T, WeightKind kKind, int kRows>
class QuantizedTilesProducer {
 public:
  __device__ __forceinline__ QuantizedTilesProducer(const QuantizedTilesBlock<kRows>& block, int group, int warp)
      : block_(block), p_(block.p), warp_(warp), offset_(group) {
    for (int i = 0; i < 2 * group; ++i) state_.advance(Layout::kStages);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int row =
          p_.swiglu ? row_block(i) % (2 * kBlocks) * 32 + row_block(i) / (2 * kBlocks) * 8 : row_block(i) * kPackedRows;
      to_[i] = swizzled_offset(kQuantizedWeights, row + lane_ % 8, lane_ / 8);
    }
  }

  __device__ __forceinline__ void run() {
    if (!p_.constant_weight) wait_for_previous_kernel();
    for (QuantizedParts parts(p_); !parts.done(); parts.advance()) make_part(parts.part());
  }

 private:
  using Layout = QuantizedTilesLayout<kRows>;
  using Row = Dequantizer<T, kKind>;
  static constexpr int kBlocks = kQuantizedWeights / kPackedRows / (kWarpgroupThreads / 32);  // of a warp
  static constexpr int kProducers = quantized_producers(kRows);
  static constexpr bool kIsInt4 = kKind == WeightKind::kInt4;
  static constexpr int kCodeBlocks = superblock_bytes_of(kKind) / kPackedBlockBytes;
  static constexpr int kRowWords = superblock_bytes_of(kKind) / kPackedRows / 4;  // of a row of a chunk
  static constexpr int kAhead = 2;
  static constexpr int kHalfRows = kRows / kQuantizedCluster;  // of x

  // What a lane loads of a chunk: codes, and scales and zero points of one of each 16 rows: lanes 0 to 15 those of the
  // first 32 k of each stage, the others those of the last.
  struct Packed {
    FullPack codes[kBlocks][kCodeBlocks];
    uint32_t scales[kBlocks][2];
    uint32_t zeros[kBlocks][2];
  };

  // The i-th block of 16 rows of this warp, of those of the tile: with SwiGLU gate rows first, then their up rows.
  __device__ __forceinline__ int row_block(int i) const { return warp_ * kBlocks + i; }

  __device__ __forceinline__ void make_part(const QuantizedPart& part) {
    const QuantizedTile tile(p_, part.tile, block_.rank);
    x_row_ = tile.row_tile * kRows + block_.rank * kHalfRows;
    const int end = part.first_chunk + part.chunks;
    int chunk = part.first_chunk + offset_;
    begin_loading(tile, chunk);
    Packed packed[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (chunk + i * kProducers < end) load(packed[i]);
    }
    wait_for_previous_kernel();  // which x may come from
#pragma unroll 1
    while (chunk < end) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (chunk >= end) break;
        if (p_.group_shift >= 2) {
          make_chunk<1>(packed[i], chunk);
        } else {
          make_chunk<4>(packed[i], chunk);
        }
        if (chunk + kAhead * kProducers < end) load(packed[i]);
        chunk += kProducers;
#pragma unroll
        for (int j = 0; j < 2 * (kProducers - 1); ++j) state_.advance(Layout::kStages);
      }
    }
    offset_ = chunk - end;
  }

  __device__ __forceinline__ void begin_loading(const QuantizedTile& tile, int chunk) {
    const int half = row_block(0) / (2 * kBlocks);
    int row = p_.swiglu ? tile.weight_tile * (kQuantizedWeights / 2) + row_block(0) % (2 * kBlocks) * kPackedRows +
                              half * p_.columns
                        : tile.weight_tile * kQuantizedWeights + row_block(0) * kPackedRows;
    // The last tile may reach beyond the weight: those results are not stored.
    if (row + (kBlocks - 1) * kPackedRows >= p_.weight_rows) row = 0;
    codes_ = p_.codes + (static_cast<int64_t>(chunk) * p_.weight_rows + row) * kRowWords + 4 * lane_;
    const int64_t group = (4 * chunk + lane_ / 16) >> p_.group_shift;
    first_scale_ = group * p_.weight_rows + row + lane_ % 16;
  }
  // Loads the warpgroup's next chunk.
  __device__ __forceinline__ void load(Packed& packed) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < kCodeBlocks; ++j) {
        packed.codes[i][j] = load_codes(codes_ + i * kPackedRows * kRowWords + j * (kPackedBlockBytes / 4));
      }
    }
    codes_ += kProducers * static_cast<int64_t>(p_.weight_rows) * kRowWords;
    load_scales(packed, 0, first_scale_);
    if (p_.group_shift < 2)
      load_scales(packed, 1, first_scale_ + static_cast<int64_t>(p_.weight_rows) * (2 >> p_.group_shift));
    first_scale_ += kProducers * (4 >> p_.group_shift) * static_cast<int64_t>(p_.weight_rows);
  }
  __device__ __forceinline__ void load_scales(Packed& packed, int stage, int64_t first) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) packed.scales[i][stage] = __ldg(p_.scales + first + i * kPackedRows);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      packed.zeros[i][stage] = p_.zeros == nullptr ? middle_code_of(kKind) : __ldg(p_.zeros + first + i * kPackedRows);
    }
  }
  static __device__ __forceinline__ FullPack load_codes(const uint32_t* from) {
    FullPack pack;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
                 : "l"(from));
    return pack;
  }

  // Makes the two stages of a chunk, whose columns have kScaleGroups groups of scales.
  template <int kScaleGroups>
  __device__ __forceinline__ void make_chunk(const Packed& packed, int chunk) {
    Row rows[kBlocks][2][kScaleGroups == 1 ? 1 : 2];  // blocks of 16 rows, rows g and g + 8, and 32 k
    if constexpr (kScaleGroups == 1) find_rows(rows, packed, 0);
#pragma unroll
    for (int stage = 0; stage < 2; ++stage) {
      if constexpr (kScaleGroups != 1) find_rows(rows, packed, stage);
      mbarrier_wait(block_.empty(state_.stage), state_.parity ^ 1);
      if (warp_ == (2 * chunk + stage) % (kWarpgroupThreads / 32) && lane_ == 0) load_x(2 * chunk + stage);
      __syncwarp();
      dequantize(rows, packed, stage);
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive(block_.full(state_.stage));
      state_.advance(Layout::kStages);
    }
  }
  template <int kRowGroups>
  __device__ __forceinline__ void find_rows(Row (&rows)[kBlocks][2][kRowGroups], const Packed& packed,
                                            int stage) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const uint32_t own = packed.scales[i][stage] | packed.zeros[i][stage] << 16;
#pragma unroll
      for (int j = 0; j < 2 * kRowGroups; ++j) {
        const uint32_t row = __shfl_sync(0xffffffffU, own, 16 * (j / 2) + 8 * (j % 2) + lane_ / 4);
        rows[i][j % 2][j / 2] = Row(row & 0xffff, row >> 16);
      }
    }
  }
  // Loads half of a stage's rows of x, for both blocks of the cluster.
  __device__ __forceinline__ void load_x(int k_block) const {
    mbarrier_arrive_expect_tx(block_.full(state_.stage), Layout::kXBytes);  // the other block's half, too
    tma_load_2d_multicast<kQuantizedCluster>(block_.x(state_.stage) + block_.rank * kHalfRows * kSwizzleBytes, p_.x,
                                             block_.full(state_.stage), k_block * kBlockK, x_row_);
  }
  template <int kRowGroups>
  __device__ __forceinline__ void dequantize(const Row (&rows)[kBlocks][2][kRowGroups], const Packed& packed,
                                             int stage) const {
    const uint32_t weights = block_.weights(state_.stage);
    const uint32_t next_rows = (p_.swiglu ? 16 : 8) * kSwizzleBytes;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // rows g, then g + 8
        const uint32_t to = weights + to_[i] + half * next_rows;
#pragma unroll
        for (int half_k = 0; half_k < 2; ++half_k) {
          const uint32_t* const block = packed.codes[i][kIsInt4 ? stage : 2 * stage + half_k].words;
          const uint2 words =
              kIsInt4 ? make_uint2(block[2 * half + half_k], 0) : make_uint2(block[2 * half], block[2 * half + 1]);
          const Row& row = rows[i][half][kRowGroups == 1 ? 0 : half_k];
          uint32_t pairs[2][2];
          row.dequantize(pairs[0], words, 0);
          row.dequantize(pairs[1], words, 1);
          // Columns 32 to 63 of a row, whose swizzled places differ in this bit.
          stmatrix_x4(to ^ (half_k * 64), {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]});
        }
      }
    }
  }

  const QuantizedTilesBlock<kRows>& block_;
  const QuantizedTilesArguments& p_;
  const int warp_;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  int offset_;  // from a part's first chunk to the warpgroup's
  int x_row_ = 0;
  uint32_t to_[kBlocks];             // where in a stage's weights the lane stores
  const uint32_t* codes_ = nullptr;  // of the chunk to be loaded
  int64_t first_scale_ = 0;          // likewise
  PipelineState state_;
};

// What a thread of a warpgroup knows of y: it has two weight rows, and two rows of x of every eight. They are rows g
// and g + 8 of a warp's 16 weight rows (g = lane / 4), or with SwiGLU a gate row and its up row.
template <typename T>
class QuantizedTilesResults {
 public:
  // `staging`: kQuantizedStoreBuffers parts, at a multiple of 1024.
  __device__ __forceinline__ QuantizedTilesResults(const QuantizedTilesArguments& p, int group, uint32_t staging)
      : p_(p), group_(group), staging_(staging) {}

  // Begins a tile: loads the bias of its weight rows.
  __device__ __forceinline__ void begin(int weight_tile) {
    first_column_ = (weight_tile * kQuantizedGroups + group_) * (p_.swiglu ? 32 : 64);
    if (p_.bias == nullptr) return;
    const T* const bias = static_cast<const T*>(p_.bias);
    const int column = first_column_ + warp_ * (p_.swiglu ? 8 : 16) + lane_ / 4;
    if (column < p_.columns) bias_[0] = to_float(bias[column]);
    const int second = p_.swiglu ? p_.columns + column : column + 8;
    if (p_.swiglu ? column < p_.columns : second < p_.columns) bias_[1] = to_float(bias[second]);
  }

  // Stores 64 rows of x from `first_row` on, whose sums are eight tiles, by way of the buffer of shared memory that
  // `part`, which counts them, names.
  __device__ __forceinline__ void store_rows(const float (*sums)[4], int first_row, int part) const {
    const uint32_t staging = staging_ + part % kQuantizedStoreBuffers * kQuantizedStoreBytes;
    const bool stores = threadIdx.x % kWarpgroupThreads == 0;
    if (stores) tma_store_wait_read<kQuantizedStoreBuffers - 1>();
    warpgroup_sync(1 + group_);
    if (p_.swiglu) {
      stage_swiglu(sums, staging);
    } else {
      stage(sums, staging);
    }
    fence_proxy_async();  // TMA reads it
    warpgroup_sync(1 + group_);
    if (stores) tma_store_2d(p_.y, staging, first_column_, first_row);
  }
  template <int kTiles>
  __device__ __forceinline__ void write_tile(const float (&sums)[kTiles][4], int first_row) const {
#pragma unroll
    for (int part = 0; part < kTiles / 8; ++part) {
      store_rows(sums + 8 * part, first_row + part * kQuantizedStoreRows, part);
    }
  }

 private:
  // Rows of x have 128 bytes in the staging memory, with SwiGLU 64, whose 16-byte chunks are permuted by the row.
  __device__ __forceinline__ void stage(const float (*sums)[4], uint32_t staging) const {
    const int matrix = lane_ / 8;
    const uint32_t own = staging + swizzled_offset(0, matrix / 2 * 8 + lane_ % 8, 2 * warp_ + matrix % 2);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const pair = &sums[i + j / 2][j % 2 * 2];
        matrices[j] = pack_pair<T>(pair[0] + bias_[j % 2], pair[1] + bias_[j % 2]);
      }
      stmatrix_x4_trans(own + i * 8 * kSwizzleBytes, matrices);
    }
  }
  __device__ __forceinline__ void stage_swiglu(const float (*sums)[4], uint32_t staging) const {
    const uint32_t own = staging + lane_ * 64 + (warp_ ^ (lane_ / 2 % 4)) * 16;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const z = sums[i + j];
        matrices[j] =
            pack_pair<T>(silu<T>(z[0] + bias_[0]) * (z[2] + bias_[1]), silu<T>(z[1] + bias_[0]) * (z[3] + bias_[1]));
      }
      stmatrix_x4_trans(own + i * 8 * 64, matrices);
    }
  }

  const QuantizedTilesArguments& p_;
  const int group_;
  const uint32_t staging_;
  const int warp_ = static_cast<int>(threadIdx.x) % kWarpgroupThreads / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  int first_column_ = 0;  // of the warpgroup
  float bias_[2] = {0.0F, 0.0F};
};

// A consumer warpgroup.
template <typename T, int kRows>
class QuantizedTilesConsumer {
 public:
  __device__ __forceinline__ QuantizedTilesConsumer(const QuantizedTilesBlock<kRows>& block, int group)
      : block_(block),
        p_(block.p),
        group_(group),
        releases_(thread_ < kQuantizedCluster),
        released_(map_to_block(block.empty(0), releases_ ? thread_ : 0)) {}

  __device__ __forceinline__ void run() {
    for (QuantizedParts parts(p_); !parts.done(); parts.advance()) {
      const QuantizedPart part = parts.part();
      const QuantizedTile tile(p_, part.tile, block_.rank);
      QuantizedTilesResults<T> results(p_, group_, block_.results + group_ * Layout::kGroupResultBytes);
      results.begin(tile.weight_tile);
      multiply(part.chunks);
      if (part.first_chunk + part.chunks < p_.chunks) {
        write_sums(part.share);
      } else {
        if (part.first_chunk > 0) add_sums(part);
        results.write_tile(sums_, tile.row_tile * kRows);
      }
    }
    bulk_store_wait();
  }

 private:
  using Layout = QuantizedTilesLayout<kRows>;
  static constexpr int kTiles = kRows / 8;

  __device__ __forceinline__ void multiply(int chunks) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    start_stage();
    for (int i = 1; i < 2 * chunks; ++i) {
      const int previous_stage = state_.stage;
      state_.advance(Layout::kStages);
      start_stage();
      wgmma_wait_group<1>();
      release(previous_stage);
    }
    wgmma_wait_group<0>();
    release(state_.stage);
    state_.advance(Layout::kStages);
  }
  // Issues a stage's wgmmas as one group.
  __device__ __forceinline__ void start_stage() {
    mbarrier_wait(block_.full(state_.stage), state_.parity);
    // Between what the producers wrote and wgmma. Here, since a fence waits for its thread's loads, too, of which the
    // producers always have some in flight.
    fence_proxy_async();
    const uint64_t weights = matrix_descriptor(block_.weights(state_.stage) + group_ * 64 * kSwizzleBytes, 16);
    const uint64_t x = matrix_descriptor(block_.x(state_.stage), 16);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSwizzleBytes; k += 32) wgmma<T>(sums_, moved_descriptor(weights, k), moved_descriptor(x, k));
    wgmma_commit_group();
  }
  // Releases a stage to the producers of both blocks, which write to it.
  __device__ __forceinline__ void release(int stage) const {
    if (releases_) mbarrier_arrive_remote(released_ + 16 * stage);
  }

  // A share has sums of one tile at most that it does not end. Where the warpgroup's are, in the order in which its
  // threads have them, and their flag:
  __device__ __forceinline__ int64_t index_of(int share) const {
    return (static_cast<int64_t>(share) * kQuantizedCluster + block_.rank) * kQuantizedGroups + group_;
  }
  __device__ __forceinline__ float4* sums_of(int share) const {
    return p_.sums + index_of(share) * (kTiles * kWarpgroupThreads) + thread_;
  }
  __device__ __forceinline__ void write_sums(int share) const {
    float4* const to = sums_of(share);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      __stcg(to + i * kWarpgroupThreads, make_float4(sums_[i][0], sums_[i][1], sums_[i][2], sums_[i][3]));
    }
    warpgroup_sync(1 + group_);
    if (thread_ == 0) store_release(p_.sums_done + index_of(share), p_.launch);
  }
  // Adds what the shares before have of the tile that `part` ends.
  __device__ __forceinline__ void add_sums(const QuantizedPart& part) {
    const int64_t first = static_cast<int64_t>(part.tile) * p_.chunks;
    for (int share = part.share; first_chunk_of_share(p_, share) > first;) {
      --share;
      if (thread_ == 0) {
        uint64_t* const done = p_.sums_done + index_of(share);
        while (load_acquire(done) != p_.launch) {
        }
        *done = 0;  // a graph launches with the same number again
      }
      warpgroup_sync(1 + group_);
      const float4* const from = sums_of(share);
#pragma unroll
      for (int i = 0; i < kTiles; i += 8) {
        float more[8][4];
#pragma unroll
        for (int j = 0; j < 8; ++j) load_sums(more[j], from + (i + j) * kWarpgroupThreads);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) sums_[i + j][k] += more[j][k];
        }
      }
    }
  }
  // volatile: all of a group are in flight before the first is needed.
  static __device__ __forceinline__ void load_sums(float (&sums)[4], const float4* from) {
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
                 : "l"(from)
                 : "memory");
  }
  static __device__ __forceinline__ void store_release(uint64_t* to, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
  }
  static __device__ __forceinline__ uint64_t load_acquire(const uint64_t* from) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
  }

  const QuantizedTilesBlock<kRows>& block_;
  const QuantizedTilesArguments& p_;
  const int group_;
  const int thread_ = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const bool releases_;      // this thread, to one block
  const uint32_t released_;  // the first stage's mbarrier of that block
  PipelineState state_;
  float sums_[kTiles][4];
};

template <typename T, WeightKind kKind, int kRows>
__global__ void __launch_bounds__(quantized_tiles_threads(kRows), 1)
    gemm_quantized_tiles(const __grid_constant__ QuantizedTilesArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(1024) char shared[];
  const QuantizedTilesBlock<kRows> block(p, shared_address(shared));
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  constexpr int kGroupWarps = kWarpgroupThreads / 32;
  const int producer = warp - kQuantizedGroups * kGroupWarps;
  if (producer == 0 && threadIdx.x % 32 == 0) {
    prefetch_tensor_map(p.x);
    prefetch_tensor_map(p.y);
    block.init_barriers();
  }
  block.sync_cluster();
  if (producer >= 0) {
    QuantizedTilesProducer<T, kKind, kRows>(block, producer / kGroupWarps, producer % kGroupWarps).run();
  } else {
    wait_for_previous_kernel();
    QuantizedTilesConsumer<T, kRows>(block, warp / kGroupWarps).run();
  }
  block.sync_cluster();  // the other block may still write here
}

}  // namespace qwen_plugins
