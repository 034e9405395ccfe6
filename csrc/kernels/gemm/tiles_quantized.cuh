// The GEMM for tens of rows and more with int4 and int8 weights on Hopper: y^T = weight · x^T.
//
// A warp-specialised persistent kernel, one block for each multiprocessor. A block computes a tile of 128 or 192 weight
// rows times 128 or 256 rows of x at a time: each of its consumer warpgroups has 64 weight rows, which it dequantizes
// in registers, as wgmma's operand a, while the tensor cores multiply the chunk before; x is operand b. The producer
// warp fills a ring buffer of pipeline stages, kBlockK elements of k each, which runs on from tile to tile: x and codes
// by TMA, scales and zero points by cp.async. The two blocks of a cluster have the same rows of x, of which each loads
// half and multicasts it to both. Launched while the previous kernel runs, as gemm_stream.
//
// Shares. The chunks of k of all tiles, tile after tile, are divided into equal shares, one or several for a cluster,
// and a share may begin and end within a tile. Of such tiles the clusters write float32 sums to the workspace, and a
// second kernel adds them in a fixed order. With as many shares as tiles there is nothing to add.
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

namespace qwen_plugins {

// A block's tile: rows of x, and consumer warpgroups, of 64 weight rows each. More of both is less to load and to
// dequantize for each product, as far as there are registers for the sums; fewer divide small GEMMs better.
template <int kTileRows, int kTileGroups>
struct QuantizedTileSize {
  static constexpr int kRows = kTileRows;
  static constexpr int kGroups = kTileGroups;
  static constexpr int kWeights = 64 * kGroups;
  static constexpr int kThreads = kWarpgroupThreads * (kGroups + 1);
};
constexpr int kQuantizedCluster = 2;    // blocks, with the same rows of x
constexpr int kQuantizedPartRows = 64;  // rows of x whose results are stored at a time

// Results of kQuantizedPartRows rows of x and a warpgroup's columns of y; 16 bytes of padding between rows spread them
// over all banks.
constexpr int kQuantizedResultRowBytes = 2 * 64 + 16;
constexpr int kQuantizedPartBytes = kQuantizedPartRows * kQuantizedResultRowBytes;

// The layout of shared memory: the ring buffer, the results to be stored, the mbarriers. A stage has x, the codes of
// the weights, and their scales and zero points, of two groups at most.
template <WeightKind kKind, typename Size>
struct QuantizedTilesLayout {
  static constexpr int kTileWeights = Size::kWeights;
  static constexpr int kXBytes = Size::kRows * kSwizzleBytes;
  static constexpr int kBlockBytes = superblock_bytes_of(kKind) * kBlockK / kPackedK;  // codes of 16 weight rows
  static constexpr int kCodeBytes = kTileWeights / kPackedRows * kBlockBytes;
  static constexpr int kScales = kXBytes + kCodeBytes;
  static constexpr int kZeros = kScales + 2 * 2 * kTileWeights;
  static constexpr int kStageBytes = divide_up(kZeros + 2 * kTileWeights, 1024) * 1024;
  static constexpr int kResultBytes = Size::kRows / kQuantizedPartRows * kQuantizedPartBytes;  // of a warpgroup
  static constexpr int kAllResultBytes = Size::kGroups * kResultBytes;
  static constexpr int kMaxBytes = 232448;  // what a block can have on Hopper
  static constexpr int kFitting = (kMaxBytes - kAllResultBytes) / (kStageBytes + 16);
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kBytes = kRingBytes + kAllResultBytes + 16 * kStages;
};

struct QuantizedTilesArguments {
  CUtensorMap codes;  // boxes of a chunk of k and a tile of weight rows
  CUtensorMap x;      // boxes of half of the rows of a tile
  const uint16_t* scales;
  const uint8_t* zeros;  // null: none
  const void* bias;
  void* y;
  float4* sums;          // of parts of tiles
  int32_t columns;       // of y
  int32_t rows;          // of x
  int32_t chunks;        // of kBlockK elements of k
  int32_t group_chunks;  // chunks with one group of scales
  int32_t groups;        // in a chunk: 2 with groups of 32, else 1
  int32_t scale_rows;    // from one group's scales to the next
  int32_t row_tiles;     // each of Size::kRows rows of x
  int32_t weight_tiles;  // each of the weight rows of the tiles of all blocks of a cluster
  int32_t shares;
  bool swiglu;  // a tile's first half is gate rows, the second their up rows
  bool constant_weight;
};

// Chunks of one tile: a share's, or a part of it.
struct QuantizedPart {
  int tile;  // of the cluster
  int first_chunk;
  int chunks;
  int share;
};

// The first chunk of a share, counted over all tiles.
__device__ __forceinline__ int64_t first_chunk_of_share(const QuantizedTilesArguments& p, int share) {
  return static_cast<int64_t>(p.row_tiles) * p.weight_tiles * p.chunks * share / p.shares;
}

// The parts that a cluster multiplies.
class QuantizedParts {
 public:
  __device__ __forceinline__ explicit QuantizedParts(const QuantizedTilesArguments& p)
      : p_(p), share_(static_cast<int>(blockIdx.x) / kQuantizedCluster) {
    begin_share();
  }
  __device__ __forceinline__ bool done() const { return share_ >= p_.shares; }
  __device__ __forceinline__ const QuantizedPart& part() const { return part_; }
  __device__ __forceinline__ void advance() {
    left_ -= part_.chunks;
    if (left_ > 0) {
      ++part_.tile;
      part_.first_chunk = 0;
      part_.chunks = min(left_, p_.chunks);
    } else {
      share_ += static_cast<int>(gridDim.x) / kQuantizedCluster;
      begin_share();
    }
  }

 private:
  __device__ __forceinline__ void begin_share() {
    if (done()) return;
    const int64_t first = first_chunk_of_share(p_, share_);
    left_ = static_cast<int>(first_chunk_of_share(p_, share_ + 1) - first);
    part_.share = share_;
    part_.tile = static_cast<int>(first / p_.chunks);
    part_.first_chunk = static_cast<int>(first - static_cast<int64_t>(part_.tile) * p_.chunks);
    part_.chunks = min(left_, p_.chunks - part_.first_chunk);
  }

  const QuantizedTilesArguments& p_;
  int share_;
  int left_ = 0;  // chunks of the share
  QuantizedPart part_{};
};

// The rows of a block's tile.
struct QuantizedTile {
  int row_tile, weight_tile;  // weight_tile: of a block, not of a cluster

  // The order of tiles: bands of row tiles, and weight tile after weight tile in a band, so that the clusters that run
  // at the same time read few rows of x and few weights.
  __device__ __forceinline__ QuantizedTile(const QuantizedTilesArguments& p, int index, int rank) {
    constexpr int kBand = 8;
    const int band = index / (kBand * p.weight_tiles);
    const int height = min(kBand, p.row_tiles - band * kBand);
    const int within = index - band * kBand * p.weight_tiles;
    row_tile = band * kBand + within % height;
    weight_tile = within / height * kQuantizedCluster + rank;
  }
};

// A block's place in its cluster, and the addresses in its shared memory.
template <WeightKind kKind, typename Size>
struct QuantizedTilesBlock {
  using Layout = QuantizedTilesLayout<kKind, Size>;
  const QuantizedTilesArguments& p;
  const uint32_t ring;  // at a multiple of 1024
  const uint32_t results = ring + Layout::kRingBytes;
  const uint32_t barriers = results + Layout::kAllResultBytes;
  const int rank = cluster_block_rank();

  __device__ __forceinline__ QuantizedTilesBlock(const QuantizedTilesArguments& arguments, uint32_t shared)
      : p(arguments), ring(shared) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ __forceinline__ uint32_t x(int stage) const { return ring + stage * Layout::kStageBytes; }
  __device__ __forceinline__ uint32_t codes(int stage) const { return x(stage) + Layout::kXBytes; }
  __device__ __forceinline__ uint32_t scales(int stage) const { return x(stage) + Layout::kScales; }
  __device__ __forceinline__ uint32_t zeros(int stage) const { return x(stage) + Layout::kZeros; }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < Layout::kStages; ++stage) {
      mbarrier_init(full(stage), 1 + 1 + 32);  // lanes that load x, codes and scales
      mbarrier_init(empty(stage), Size::kGroups * kQuantizedCluster);
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

// A producer warp: loads a part of all chunks of the block's tiles, as many stages ahead as the ring buffer has. Codes,
// scales and x have a warp each: the instructions of all take one longer than wgmma. A whole warp runs the loop even
// where one lane loads, so that the compiler knows addresses and coordinates to be the same in all lanes, as TMA needs
// them.
template <WeightKind kKind, typename Size, typename Load>
__device__ __forceinline__ void produce(const QuantizedTilesBlock<kKind, Size>& block, Load load) {
  using Layout = QuantizedTilesLayout<kKind, Size>;
  PipelineState state;
  int free_stages = Layout::kStages;  // at first
  for (QuantizedParts parts(block.p); !parts.done(); parts.advance()) {
    int chunk = parts.part().first_chunk;
    const int end = chunk + parts.part().chunks;
    const QuantizedTile tile(block.p, parts.part().tile, block.rank);
    load.begin(tile, chunk);
#pragma unroll 1
    for (; chunk < end; ++chunk) {
      if (free_stages > 0) {
        --free_stages;
      } else {
        mbarrier_wait(block.empty(state.stage), state.parity ^ 1);
      }
      if (static_cast<int>(threadIdx.x) % 32 < Load::kLanes) load(state.stage, chunk);
      __syncwarp();
      load.advance();
      state.advance(Layout::kStages);
    }
  }
}

// Loads x: half of a stage's rows, for both blocks of the cluster.
template <WeightKind kKind, typename Size>
class LoadX {
 public:
  static constexpr int kLanes = 1;
  __device__ __forceinline__ explicit LoadX(const QuantizedTilesBlock<kKind, Size>& block) : block_(block) {}

  __device__ __forceinline__ void begin(const QuantizedTile& tile, int) {
    row_ = tile.row_tile * Size::kRows + block_.rank * kHalf;
  }
  __device__ __forceinline__ void operator()(int stage, int chunk) const {
    mbarrier_arrive_expect_tx(block_.full(stage), 2 * kHalf * kSwizzleBytes);  // the other block's half, too
    tma_load_2d_multicast<kQuantizedCluster>(block_.x(stage) + block_.rank * kHalf * kSwizzleBytes, block_.p.x,
                                             block_.full(stage), chunk * kBlockK, row_);
  }
  __device__ __forceinline__ void advance() {}

 private:
  static constexpr int kHalf = Size::kRows / kQuantizedCluster;
  const QuantizedTilesBlock<kKind, Size>& block_;
  int row_ = 0;
};

// The first weight row of a tile, with SwiGLU of its gate rows.
template <typename Size>
__device__ __forceinline__ int first_weight_row(const QuantizedTilesArguments& p, const QuantizedTile& tile) {
  return tile.weight_tile * (p.swiglu ? Size::kWeights / 2 : Size::kWeights);
}

template <WeightKind kKind, typename Size>
class LoadCodes {
 public:
  static constexpr int kLanes = 1;
  __device__ __forceinline__ explicit LoadCodes(const QuantizedTilesBlock<kKind, Size>& block) : block_(block) {}

  __device__ __forceinline__ void begin(const QuantizedTile& tile, int) {
    row_block_ = first_weight_row<Size>(block_.p, tile) / kPackedRows;
  }
  __device__ __forceinline__ void operator()(int stage, int chunk) const {
    mbarrier_arrive_expect_tx(block_.full(stage), Layout::kCodeBytes);
    // Coordinates: encode_codes_tensor_map.
    tma_load_4d_multicast<1>(block_.codes(stage), block_.p.codes, block_.full(stage),
                             chunk % 2 * (Layout::kBlockBytes / 4), row_block_, 0, chunk / 2);
  }
  __device__ __forceinline__ void advance() {}

 private:
  using Layout = QuantizedTilesLayout<kKind, Size>;
  const QuantizedTilesBlock<kKind, Size>& block_;
  int row_block_ = 0;
};

// Loads scales and zero points, 16 bytes a lane: TMA would take as long for these few as for a stage's codes.
template <WeightKind kKind, typename Size>
class LoadScales {
 public:
  static constexpr int kLanes = 32;
  __device__ __forceinline__ explicit LoadScales(const QuantizedTilesBlock<kKind, Size>& block)
      : block_(block), p_(block.p) {}

  __device__ __forceinline__ void begin(const QuantizedTile& tile, int chunk) {
    const int group = chunk / p_.group_chunks;
    chunks_left_ = p_.group_chunks - (chunk - group * p_.group_chunks);
    const int64_t first = static_cast<int64_t>(group) * p_.groups * p_.scale_rows;
    scales_ = Part(p_, tile, 8, first);
    zeros_ = Part(p_, tile, 16, first);
  }
  __device__ __forceinline__ void operator()(int stage, int) const {
    for (int group = 0; group < p_.groups; ++group) {
      const int to = group * kTileWeights;
      const int64_t from = static_cast<int64_t>(group) * p_.scale_rows;
      if (scales_.loads) {
        cp_async_16(block_.scales(stage) + 2 * (scales_.to + to), p_.scales + scales_.from + from, scales_.exists);
      }
      if (p_.zeros != nullptr && zeros_.loads) {
        cp_async_16(block_.zeros(stage) + zeros_.to + to, p_.zeros + zeros_.from + from, zeros_.exists);
      }
    }
    mbarrier_arrive_after_cp_async(block_.full(stage));
  }
  __device__ __forceinline__ void advance() {
    if (--chunks_left_ > 0) return;
    chunks_left_ = p_.group_chunks;
    scales_.from += static_cast<int64_t>(p_.groups) * p_.scale_rows;
    zeros_.from += static_cast<int64_t>(p_.groups) * p_.scale_rows;
  }

 private:
  static constexpr int kTileWeights = Size::kWeights;

  // What a lane loads: `count` rows of a group of a chunk.
  struct Part {
    bool loads = false, exists = false;
    int to = 0;
    int64_t from = 0;

    Part() = default;
    __device__ __forceinline__ Part(const QuantizedTilesArguments& p, const QuantizedTile& tile, int count,
                                    int64_t first) {
      constexpr int kHalf = kTileWeights / 2;
      to = static_cast<int>(threadIdx.x) % 32 * count;
      loads = to < kTileWeights;
      const int row = first_weight_row<Size>(p, tile) + to + (p.swiglu && to >= kHalf ? p.columns - kHalf : 0);
      exists = loads && row < p.scale_rows;
      from = exists ? first + row : 0;
    }
  };

  const QuantizedTilesBlock<kKind, Size>& block_;
  const QuantizedTilesArguments& p_;
  int chunks_left_ = 0;
  Part scales_, zeros_;
};

// What a thread of a warpgroup knows of y: it has two weight rows, and two rows of x of every eight. They are rows g
// and g + 8 of a warp's 16 weight rows (g = lane / 4), or with SwiGLU a gate row and its up row.
template <typename T, typename Size>
class QuantizedTilesResults {
 public:
  __device__ __forceinline__ QuantizedTilesResults(const QuantizedTilesArguments& p, int group, uint32_t staging)
      : p_(p), group_(group), staging_(staging) {}

  // The bias of a tile's weight rows.
  __device__ __forceinline__ void load_bias(int weight_tile) {
    if (p_.bias == nullptr) return;
    const T* const bias = static_cast<const T*>(p_.bias);
    const int column = first_column(weight_tile) + warp_ * (p_.swiglu ? 8 : 16) + lane_ / 4;
    if (column < p_.columns) bias_[0] = to_float(bias[column]);
    const int second = p_.swiglu ? p_.columns + column : column + 8;
    if (p_.swiglu ? column < p_.columns : second < p_.columns) bias_[1] = to_float(bias[second]);
  }

  // Stores 64 rows of x from `first_row` on, whose sums are eight tiles, by way of shared memory.
  __device__ __forceinline__ void write_part(const float (*sums)[4], int first_row, int weight_tile,
                                             uint32_t staging) const {
    if (p_.swiglu) {
      stage_swiglu(sums, staging);
    } else {
      stage(sums, staging);
    }
    fence_proxy_async();  // bulk copies read it
    warpgroup_sync(1 + group_);
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
    const int row = first_row + thread;
    const int column = first_column(weight_tile);
    const int columns = min(group_columns(), p_.columns - column);
    if (thread < kQuantizedPartRows && row < p_.rows && columns > 0) {
      bulk_store(static_cast<T*>(p_.y) + static_cast<int64_t>(row) * p_.columns + column,
                 staging + thread * kQuantizedResultRowBytes, 2 * columns);
    }
  }
  // Writes all parts of a tile; the staging memory has been read by the stores of the tile before.
  template <int kTiles>
  __device__ __forceinline__ void write_tile(const float (&sums)[kTiles][4], int first_row, int weight_tile) const {
    bulk_store_wait_read();
    warpgroup_sync(1 + group_);
#pragma unroll
    for (int part = 0; part < kTiles / 8; ++part) {
      write_part(sums + 8 * part, first_row + part * kQuantizedPartRows, weight_tile,
                 staging_ + part * kQuantizedPartBytes);
    }
  }

 private:
  __device__ __forceinline__ int group_columns() const { return p_.swiglu ? 32 : 64; }
  __device__ __forceinline__ int first_column(int weight_tile) const {
    return (weight_tile * Size::kGroups + group_) * group_columns();
  }
  __device__ __forceinline__ void stage(const float (*sums)[4], uint32_t staging) const {
    const int matrix = lane_ / 8;
    const uint32_t own =
        staging + (matrix / 2 * 8 + lane_ % 8) * kQuantizedResultRowBytes + (2 * warp_ + matrix % 2) * 16;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const pair = &sums[i + j / 2][j % 2 * 2];
        matrices[j] = pack_pair<T>(pair[0] + bias_[j % 2], pair[1] + bias_[j % 2]);
      }
      stmatrix_x4_trans(own + i * 8 * kQuantizedResultRowBytes, matrices);
    }
  }
  __device__ __forceinline__ void stage_swiglu(const float (*sums)[4], uint32_t staging) const {
    const uint32_t own = staging + lane_ * kQuantizedResultRowBytes + warp_ * 16;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint32_t matrices[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const z = sums[i + j];
        matrices[j] =
            pack_pair<T>(silu<T>(z[0] + bias_[0]) * (z[2] + bias_[1]), silu<T>(z[1] + bias_[0]) * (z[3] + bias_[1]));
      }
      stmatrix_x4_trans(own + i * 8 * kQuantizedResultRowBytes, matrices);
    }
  }

  const QuantizedTilesArguments& p_;
  const int group_;
  const uint32_t staging_;
  const int warp_ = static_cast<int>(threadIdx.x) % kWarpgroupThreads / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  float bias_[2] = {0.0F, 0.0F};
};

// Where a warpgroup's sums of a part are in the workspace, in the order in which its threads have them. A share has two
// places: at most its first part begins within a tile, and at most its last is a part that begins a tile.
template <typename Size>
__device__ __forceinline__ float4* partial_sums(const QuantizedTilesArguments& p, int share, bool begins_tile, int rank,
                                                int group) {
  const int64_t index = (int64_t{2} * share + (begins_tile ? 1 : 0)) * kQuantizedCluster + rank;
  return p.sums + (index * Size::kGroups + group) * (Size::kRows / 8 * kWarpgroupThreads);
}

// A consumer warpgroup.
template <typename T, WeightKind kKind, typename Size>
class QuantizedTilesConsumer {
 public:
  __device__ __forceinline__ QuantizedTilesConsumer(const QuantizedTilesBlock<kKind, Size>& block, int group)
      : block_(block), p_(block.p), group_(group) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (p_.swiglu) {
      rows_[0] = 8 * warp + lane / 4;
      rows_[1] = Layout::kTileWeights / 2 + rows_[0];
      words_[0] = warp / 2 * Layout::kBlockBytes + lane * 16 + warp % 2 * 8;
      words_[1] = Layout::kTileWeights / 2 / kPackedRows * Layout::kBlockBytes + words_[0];
    } else {
      rows_[0] = kPackedRows * warp + lane / 4;
      rows_[1] = rows_[0] + 8;
      words_[0] = warp * Layout::kBlockBytes + lane * 16;
      words_[1] = words_[0] + 8;
    }
  }

  // Multiplies `chunks` chunks, at least one. Three wgmmas are in flight while the operand of the next is dequantized.
  __device__ __forceinline__ void multiply(int chunks) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) sums_[i][0] = sums_[i][1] = sums_[i][2] = sums_[i][3] = 0.0F;
    uint32_t a[kSteps][4];
    int previous_stage = -1;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      mbarrier_wait(block_.full(state_.stage), state_.parity);
      const PackedChunk packed = load();
      const uint64_t x = matrix_descriptor(block_.x(state_.stage), 16);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        wgmma_wait_group<kSteps - 1>();  // that of this step of the previous chunk has read a[step]
        if (step == kSteps - 1 && previous_stage >= 0) release(previous_stage);
        dequantize(a[step], packed, step);
        wgmma_fence();
        wgmma_transposed<T>(sums_, a[step], moved_descriptor(x, 32 * step));
        wgmma_commit_group();
      }
      previous_stage = state_.stage;
      state_.advance(Layout::kStages);
    }
    wgmma_wait_group<0>();
    release(previous_stage);
  }

  // Stores y, or the sums of a part of a tile.
  __device__ __forceinline__ void write(const QuantizedTile& tile,
                                        const QuantizedTilesResults<T, Size>& results) const {
    results.write_tile(sums_, tile.row_tile * Size::kRows, tile.weight_tile);
  }
  __device__ __forceinline__ void write_sums(const QuantizedPart& part) const {
    float4* const to = partial_sums<Size>(p_, part.share, part.first_chunk == 0, block_.rank, group_) +
                       threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      to[i * kWarpgroupThreads] = make_float4(sums_[i][0], sums_[i][1], sums_[i][2], sums_[i][3]);
    }
  }

 private:
  using Layout = QuantizedTilesLayout<kKind, Size>;
  static constexpr int kTiles = Size::kRows / 8;
  static constexpr int kSteps = kBlockK / 16;  // wgmmas of a chunk

  // What a thread dequantizes of a chunk: for each of its rows and for both halves of the columns of k.
  struct PackedChunk {
    uint2 words[2][2];
    uint32_t scales[2][2], zeros[2][2];
  };

  __device__ __forceinline__ PackedChunk load() const {
    PackedChunk packed;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t codes = block_.codes(state_.stage) + words_[row];
      packed.words[row][0] = load_shared_64(codes);
      if constexpr (kKind == WeightKind::kInt4) {
        packed.words[row][1].x = packed.words[row][0].y;
      } else {
        packed.words[row][1] = load_shared_64(codes + kPackedBlockBytes);
      }
      load_scale(packed, row, 0);
      if (p_.groups == 2) {
        load_scale(packed, row, 1);
      } else {
        packed.scales[row][1] = packed.scales[row][0];
        packed.zeros[row][1] = packed.zeros[row][0];
      }
    }
    return packed;
  }
  __device__ __forceinline__ void load_scale(PackedChunk& packed, int row, int half) const {
    const int index = half * Layout::kTileWeights + rows_[row];
    packed.scales[row][half] = load_shared_16(block_.scales(state_.stage) + 2 * index);
    packed.zeros[row][half] = middle_code_of(kKind);
    if (p_.zeros != nullptr) packed.zeros[row][half] = load_shared_8(block_.zeros(state_.stage) + index);
  }
  static __device__ __forceinline__ void dequantize(uint32_t (&a)[4], const PackedChunk& packed, int step) {
    const int half = step / 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Dequantizer<T, kKind> weights(packed.scales[row][half], packed.zeros[row][half]);
      uint32_t pairs[2];
      weights.dequantize(pairs, packed.words[row][half], step % 2);
      a[row] = pairs[0];
      a[2 + row] = pairs[1];
    }
  }
  // Releases a stage to the producers of both blocks, which write to it.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % kWarpgroupThreads != 0) return;
#pragma unroll
    for (int rank = 0; rank < kQuantizedCluster; ++rank) {
      mbarrier_arrive_remote(map_to_block(block_.empty(stage), rank));
    }
  }

  const QuantizedTilesBlock<kKind, Size>& block_;
  const QuantizedTilesArguments& p_;
  const int group_;
  int rows_[2];   // the thread's weight rows, in the tile
  int words_[2];  // the bytes before their first words, in a stage's codes
  PipelineState state_;
  float sums_[kTiles][4];
};

template <typename T, WeightKind kKind, typename Size>
__global__ void __launch_bounds__(Size::kThreads, 1)
    gemm_quantized_tiles(const __grid_constant__ QuantizedTilesArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(1024) char shared[];
  const QuantizedTilesBlock<kKind, Size> block(p, shared_address(shared));
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  constexpr int kGroups = Size::kGroups;
  const int producer = warp - kWarpgroupThreads * kGroups / 32;
  if (producer == 0 && threadIdx.x % 32 == 0) {
    prefetch_tensor_map(p.codes);
    prefetch_tensor_map(p.x);
    block.init_barriers();
  }
  block.sync_cluster();
  // Sums and fragments do not fit into a third of the registers.
  if (producer >= 0) {
    release_registers<40>();
    if (producer == 2 || !p.constant_weight) wait_for_previous_kernel();
    if (producer == 0) produce(block, LoadCodes<kKind, Size>(block));
    if (producer == 1) produce(block, LoadScales<kKind, Size>(block));
    if (producer == 2) produce(block, LoadX<kKind, Size>(block));
  } else {
    take_registers<kGroups == 2 ? 232 : 152>();
    wait_for_previous_kernel();
    const int group = warp / (kWarpgroupThreads / 32);
    QuantizedTilesConsumer<T, kKind, Size> consumer(block, group);
    using Layout = QuantizedTilesLayout<kKind, Size>;
    for (QuantizedParts parts(p); !parts.done(); parts.advance()) {
      const QuantizedPart part = parts.part();
      const QuantizedTile tile(p, part.tile, block.rank);
      QuantizedTilesResults<T, Size> results(p, group, block.results + group * Layout::kResultBytes);
      const bool is_whole = part.chunks == p.chunks;
      if (is_whole) results.load_bias(tile.weight_tile);
      consumer.multiply(part.chunks);
      if (is_whole) {
        consumer.write(tile, results);
      } else {
        consumer.write_sums(part);
      }
    }
    bulk_store_wait();
  }
  block.sync_cluster();  // the other block may still write here
}

// Adds the sums of a tile's parts. For each beginning of a share that is the first one within a tile (x, together with
// a block of the cluster and a warpgroup), and each part of the tile's rows of x (y), a block.
template <typename T, typename Size>
__global__ void __launch_bounds__(kWarpgroupThreads)
    gemm_quantized_tiles_add(const __grid_constant__ QuantizedTilesArguments p) {
  trigger_dependent_launch();
  __shared__ __align__(16) char staging[kQuantizedPartBytes];
  constexpr int kGroups = Size::kGroups;
  const int group = static_cast<int>(blockIdx.x) % kGroups;
  const int rank = static_cast<int>(blockIdx.x) / kGroups % kQuantizedCluster;
  int share = static_cast<int>(blockIdx.x) / (kGroups * kQuantizedCluster);  // that has the tile's beginning
  wait_for_previous_kernel();
  const int64_t within = first_chunk_of_share(p, share + 1);
  const int64_t first = within / p.chunks * p.chunks;  // chunk of the tile
  if (within == first || first_chunk_of_share(p, share) > first) return;
  const QuantizedTile tile(p, static_cast<int>(first / p.chunks), rank);
  const int rows = static_cast<int>(blockIdx.y);
  QuantizedTilesResults<T, Size> results(p, group, 0);
  results.load_bias(tile.weight_tile);
  float sums[8][4] = {};
  for (bool begins_tile = true; first_chunk_of_share(p, share) < first + p.chunks; ++share, begins_tile = false) {
    const float4* const from =
        partial_sums<Size>(p, share, begins_tile, rank, group) + rows * 8 * kWarpgroupThreads + threadIdx.x;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 more = from[i * kWarpgroupThreads];
      sums[i][0] += more.x;
      sums[i][1] += more.y;
      sums[i][2] += more.z;
      sums[i][3] += more.w;
    }
  }
  results.write_part(sums, tile.row_tile * Size::kRows + rows * kQuantizedPartRows, tile.weight_tile,
                     shared_address(staging));
  bulk_store_wait();
}

}  // namespace qwen_plugins
