// The GEMM for tens of rows and more with int4 and int8 weights on Hopper: y^T = weight · x^T.
//
// A warp-specialised persistent kernel, one block for each multiprocessor. A block computes a tile of 128 weight rows
// times 128 or 256 rows of x at a time: each of two consumer warpgroups has 64 weight rows, which it dequantizes in
// registers, as wgmma's operand a. x is operand b: the producer warp loads it by TMA into a ring buffer of pipeline
// stages, kBlockK elements of k each, which runs on from tile to tile. The two blocks of a cluster have the same rows
// of x, of which each loads half and multicasts it to both. Launched while the previous kernel runs, as gemm_stream.
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

// The consumers', and a warpgroup whose first thread loads x.
constexpr int kQuantizedTilesThreads = kWarpgroupThreads * (kQuantizedGroups + 1);

// Results of 64 rows of x and a warpgroup's columns of y are stored at a time, while the next are made.
constexpr int kQuantizedStoreRows = 64;
constexpr int kQuantizedStoreBytes = kQuantizedStoreRows * kSwizzleBytes;
constexpr int kQuantizedStoreBuffers = 2;

// The layout of shared memory: the ring buffer of x, the results to be stored, the mbarriers.
template <int kRows>
struct QuantizedTilesLayout {
  static constexpr int kStageBytes = kRows * kSwizzleBytes;
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
  __device__ __forceinline__ uint32_t x(int stage) const { return ring + stage * Layout::kStageBytes; }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < Layout::kStages; ++stage) {
      mbarrier_init(full(stage), 1);  // the thread that loads x
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

// Loads x, one thread for all stages: half of their rows, for both blocks of the cluster.
template <int kRows>
__device__ __forceinline__ void produce_x(const QuantizedTilesBlock<kRows>& block) {
  using Layout = QuantizedTilesLayout<kRows>;
  constexpr int kHalfRows = kRows / kQuantizedCluster;
  PipelineState state;
  for (QuantizedParts parts(block.p); !parts.done(); parts.advance()) {
    const QuantizedPart part = parts.part();
    const int first_row = QuantizedTile(block.p, part.tile, block.rank).row_tile * kRows + block.rank * kHalfRows;
    const int end = 2 * (part.first_chunk + part.chunks);
#pragma unroll 1
    for (int k_block = 2 * part.first_chunk; k_block < end; ++k_block) {
      mbarrier_wait(block.empty(state.stage), state.parity ^ 1);
      mbarrier_arrive_expect_tx(block.full(state.stage), Layout::kStageBytes);  // the other block's half, too
      tma_load_2d_multicast<kQuantizedCluster>(block.x(state.stage) + block.rank * kHalfRows * kSwizzleBytes, block.p.x,
                                               block.full(state.stage), k_block * kBlockK, first_row);
      state.advance(Layout::kStages);
    }
  }
}

// The weights of a warp: its 16 rows of a tile, or with SwiGLU 8 gate rows and their up rows. Codes and scales go from
// global memory into registers some chunks ahead; a lane's words are its part of wgmma's operand a.
template <typename T, WeightKind kKind>
class QuantizedTilesWeights {
 public:
  // What a lane loads of a chunk: codes of its two rows, and scales and zero points of one of the warp's 16 rows: lanes
  // 0 to 15 those of the first 32 k of each stage, the others those of the last.
  struct Packed {
    uint2 codes[superblock_bytes_of(kKind) / kPackedBlockBytes][2];
    uint32_t scales[2];
    uint32_t zeros[2];
  };
  // Operand a of the wgmmas of a stage.
  using Fragments = uint32_t[kBlockK / 16][4];

  __device__ __forceinline__ explicit QuantizedTilesWeights(const QuantizedTilesArguments& p) : p_(p) {}

  // The next chunk to be loaded is `chunk` of the tile. `warp`: of the block's.
  __device__ __forceinline__ void begin(int weight_tile, int warp, int chunk) {
    // The last tile may reach beyond the weight: those results are not stored.
    int rows[2];  // the first rows of the warp's two halves
    if (p_.swiglu) {
      rows[0] = weight_tile * (kQuantizedWeights / 2) + warp * 8;
      if (rows[0] >= p_.columns) rows[0] = 0;
      rows[1] = rows[0] + p_.columns;
    } else {
      rows[0] = weight_tile * kQuantizedWeights + warp * kPackedRows;
      if (rows[0] >= p_.weight_rows) rows[0] = 0;
      rows[1] = rows[0] + 8;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codes_[half] =
          p_.codes +
          (static_cast<int64_t>(chunk) * p_.weight_rows + rows[half] / kPackedRows * kPackedRows) * kRowWords +
          4 * lane_ + rows[half] / 8 % 2 * 2;
    }
    const int64_t group = (4 * chunk + lane_ / 16) >> p_.group_shift;
    first_scale_ = group * p_.weight_rows + (lane_ % 16 < 8 ? rows[0] : rows[1]) + lane_ % 8;
  }
  // Loads the next chunk.
  __device__ __forceinline__ void load(Packed& packed) {
#pragma unroll
    for (int block = 0; block < superblock_bytes_of(kKind) / kPackedBlockBytes; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        packed.codes[block][half] = load_codes(codes_[half] + block * (kPackedBlockBytes / 4));
      }
    }
    codes_[0] += static_cast<int64_t>(p_.weight_rows) * kRowWords;
    codes_[1] += static_cast<int64_t>(p_.weight_rows) * kRowWords;
    load_scales(packed, 0, first_scale_);
    // Groups of 128 and more have one scale for both stages.
    if (p_.group_shift < 2) {
      load_scales(packed, 1, first_scale_ + static_cast<int64_t>(p_.weight_rows) * (2 >> p_.group_shift));
    }
    first_scale_ += (4 >> p_.group_shift) * static_cast<int64_t>(p_.weight_rows);
  }
  // Dequantizes a stage of a chunk, the first before the second. kOneGroup: both stages have one group of scales.
  template <bool kOneGroup>
  __device__ __forceinline__ void dequantize(Fragments& a, const Packed& packed, int stage) {
    if (!kOneGroup || stage == 0) find_rows<kOneGroup>(packed, stage);
#pragma unroll
    for (int step = 0; step < kBlockK / 16; ++step) {
      const int half_k = step / 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 codes = packed.codes[kIsInt4 ? stage : 2 * stage + half_k][half];
        const uint2 words = kIsInt4 ? make_uint2(half_k == 0 ? codes.x : codes.y, 0) : codes;
        uint32_t pairs[2];
        rows_[half][kOneGroup ? 0 : half_k].dequantize(pairs, words, step % 2);
        a[step][half] = pairs[0];
        a[step][2 + half] = pairs[1];
      }
    }
  }

 private:
  using Row = Dequantizer<T, kKind>;
  static constexpr bool kIsInt4 = kKind == WeightKind::kInt4;
  static constexpr int kRowWords = superblock_bytes_of(kKind) / kPackedRows / 4;  // of a row of a chunk

  static __device__ __forceinline__ uint2 load_codes(const uint32_t* from) {
    uint2 words;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from));
    return words;
  }
  __device__ __forceinline__ void load_scales(Packed& packed, int stage, int64_t first) const {
    packed.scales[stage] = __ldg(p_.scales + first);
    packed.zeros[stage] = p_.zeros == nullptr ? middle_code_of(kKind) : __ldg(p_.zeros + first);
  }
  template <bool kOneGroup>
  __device__ __forceinline__ void find_rows(const Packed& packed, int stage) {
    const uint32_t own = packed.scales[stage] | packed.zeros[stage] << 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int half_k = 0; half_k < (kOneGroup ? 1 : 2); ++half_k) {
        const uint32_t row = __shfl_sync(0xffffffffU, own, 16 * half_k + 8 * half + lane_ / 4);
        rows_[half][half_k] = Row(row & 0xffff, row >> 16);
      }
    }
  }

  const QuantizedTilesArguments& p_;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const uint32_t* codes_[2] = {nullptr, nullptr};  // of both halves of the warp's rows, of the chunk to be loaded
  int64_t first_scale_ = 0;                        // likewise
  Row rows_[2][2];                                 // of both halves, and of the first and the last 32 k of a stage
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
template <typename T, WeightKind kKind, int kRows>
class QuantizedTilesConsumer {
 public:
  __device__ __forceinline__ QuantizedTilesConsumer(const QuantizedTilesBlock<kRows>& block, int group)
      : block_(block),
        p_(block.p),
        group_(group),
        releases_(thread_ < kQuantizedCluster),
        released_(map_to_block(block.empty(0), releases_ ? thread_ : 0)),
        weights_(block.p) {}

  __device__ __forceinline__ void run() {
    if (!p_.constant_weight) wait_for_previous_kernel();
    for (QuantizedParts parts(p_); !parts.done(); parts.advance()) {
      const QuantizedPart part = parts.part();
      const QuantizedTile tile(p_, part.tile, block_.rank);
      QuantizedTilesResults<T> results(p_, group_, block_.results + group_ * Layout::kGroupResultBytes);
      results.begin(tile.weight_tile);
      weights_.begin(tile.weight_tile, group_ * (kWarpgroupThreads / 32) + thread_ / 32, part.first_chunk);
      if (p_.group_shift >= 2) {
        multiply<true>(part.chunks);
      } else {
        multiply<false>(part.chunks);
      }
      wait_for_previous_kernel();  // which may use what is written now
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
  using Weights = QuantizedTilesWeights<T, kKind>;
  static constexpr int kTiles = kRows / 8;
  static constexpr int kAhead = 2;  // chunks

  // While the wgmmas of a stage run, the next stage is dequantized.
  template <bool kOneGroup>
  __device__ __forceinline__ void multiply(int chunks) {
    typename Weights::Packed packed[kAhead];
    typename Weights::Fragments a[2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < chunks) weights_.load(packed[i]);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    weights_.template dequantize<kOneGroup>(a[0], packed[0], 0);
    int previous_stage = -1;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (chunk + i >= chunks) break;
        previous_stage = start_stage(a[0], previous_stage);
        weights_.template dequantize<kOneGroup>(a[1], packed[i], 1);
        if (chunk + i + kAhead < chunks) weights_.load(packed[i]);
        previous_stage = start_stage(a[1], previous_stage);
        if (chunk + i + 1 < chunks) weights_.template dequantize<kOneGroup>(a[0], packed[(i + 1) % kAhead], 0);
      }
    }
    wgmma_wait_group<0>();
    release(previous_stage);
  }
  // Issues a stage's wgmmas as one group. Waits for the group before it, whose registers are free then, and releases
  // its stage (-1: there is none). Returns the stage.
  __device__ __forceinline__ int start_stage(const typename Weights::Fragments& a, int previous_stage) {
    mbarrier_wait(block_.full(state_.stage), state_.parity);
    const uint64_t x = matrix_descriptor(block_.x(state_.stage), 16);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlockK / 16; ++i) wgmma_transposed<T>(sums_, a[i], moved_descriptor(x, 32 * i));
    wgmma_commit_group();
    wgmma_wait_group<1>();
    if (previous_stage >= 0) release(previous_stage);
    const int stage = state_.stage;
    state_.advance(Layout::kStages);
    return stage;
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
  Weights weights_;
  float sums_[kTiles][4];
};

template <typename T, WeightKind kKind, int kRows>
__global__ void __launch_bounds__(kQuantizedTilesThreads, 1)
    gemm_quantized_tiles(const __grid_constant__ QuantizedTilesArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(1024) char shared[];
  const QuantizedTilesBlock<kRows> block(p, shared_address(shared));
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  constexpr int kGroupWarps = kWarpgroupThreads / 32;
  const bool produces = warp == kQuantizedGroups * kGroupWarps && threadIdx.x % 32 == 0;
  if (produces) {
    prefetch_tensor_map(p.x);
    prefetch_tensor_map(p.y);
    block.init_barriers();
  }
  block.sync_cluster();
  // Sums and fragments do not fit into a third of the registers.
  if (warp >= kQuantizedGroups * kGroupWarps) {
    release_registers<24>();
    if (produces) {
      wait_for_previous_kernel();
      produce_x(block);
    }
    __syncwarp();
  } else {
    take_registers<240>();
    QuantizedTilesConsumer<T, kKind, kRows>(block, warp / kGroupWarps).run();
  }
  block.sync_cluster();  // the other block may still write here
}

}  // namespace qwen_plugins
