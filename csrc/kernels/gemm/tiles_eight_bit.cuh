// The GEMM of 8-bit x and 8-bit weights on Hopper for tens of rows and more: prompts and large batches.
//
// A warp-specialised persistent kernel, one block for each multiprocessor. A block computes a tile of 128 rows of x
// times kColumns weight rows at a time: two consumer warpgroups have 64 rows of x each, wgmma's operand a; the weight
// is operand b. The producer fills a ring buffer of pipeline stages by TMA, 128 k each, which runs on from tile to
// tile. The blocks of a cluster are neighbours: those with the same rows of x each load a part of these, those with the
// same weight rows a part of these, and multicast it. Two codes are loaded as one 16-bit element, and wgmma multiplies
// codes as they are. Launched while the previous kernel runs, as gemm_stream.
//
// int8 is summed exactly in int32. Of e4m3 wgmma keeps fewer bits of a sum than float32 has, so the products of each
// chunk, 128 k, are summed alone, and added in float32: times the scale of the weight's block, where it has blocks of
// 128 x 128. One warpgroup adds while the other's chunk is multiplied. With 256 weight rows a thread has no registers
// for a second set of sums: there a chunk is multiplied and added in halves, 128 weight rows each.
//
// Shares. Each of the first tiles is a share of its own. The chunks of k of the others, tile after tile, are divided
// into equal shares, one or several for a cluster, and a share may begin and end within a tile. Of such tiles the
// clusters write sums to the workspace, and a second kernel adds them in a fixed order.
#pragma once

#include <cuda.h>

#include "hopper_operands.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/quotient.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/common/wgmma_eight_bit.cuh"
#include "silu.cuh"

namespace qwen_plugins {

constexpr int kEightBitRows = 128;  // of x, in a tile
constexpr int kEightBitGroups = 2;  // consumer warpgroups of a block
constexpr int kEightBitThreads = kWarpgroupThreads * (kEightBitGroups + 1);
constexpr int kEightBitXBytes = kEightBitRows * kSwizzleBytes;  // of a stage
constexpr int kEightBitBlock = 128;                             // weight rows, and k, that share a scale

// Results are stored in slots of a warp: 16 rows of x, and the tiles of 8 columns of y that kSlotRows weight rows make.
// A warp has slots for all of a tile, which were read long before it has the next.
constexpr int kSlotRows = 64;
template <bool kSwiglu>
constexpr int kSlotTiles = kSlotRows / 8 / (kSwiglu ? 2 : 1);
constexpr int kSlotBytes = 16 * kSlotRows * 2;
// Scales and bias of 2 neighbouring weight rows.
constexpr int kPairBytes = 16;

// The layout of shared memory: the ring buffer, the results to be stored, the mbarriers.
template <int kColumns>
struct EightBitLayout {
  static constexpr int kStageBytes = kEightBitXBytes + kColumns * kSwizzleBytes;
  static constexpr int kWarpSlotsBytes = kColumns / kSlotRows * kSlotBytes;
  static constexpr int kSlotsBytes = 4 * kEightBitGroups * kWarpSlotsBytes;
  static constexpr int kPairsBytes = kColumns / 2 * kPairBytes;  // of a warpgroup
  static constexpr int kResultBytes = kSlotsBytes + kEightBitGroups * kPairsBytes;
  static constexpr int kMaxBytes = 232448;  // what a block can have on Hopper
  static constexpr int kFitting = (kMaxBytes - kResultBytes) / (kStageBytes + 16);
  static constexpr int kStages = kFitting < 6 ? kFitting : 6;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kBytes = kRingBytes + kResultBytes + 16 * kStages;
};

// Divides by a number that the host knows: a division on the device takes hundreds of cycles, in which nothing is
// multiplied.
struct EightBitDivisor {
  uint32_t divisor = 1, reciprocal = UINT32_MAX;

  EightBitDivisor() = default;
  explicit EightBitDivisor(int64_t number) : divisor(static_cast<uint32_t>(number)), reciprocal(UINT32_MAX / divisor) {}
  __device__ __forceinline__ uint32_t divide(uint32_t number, uint32_t& remainder) const {
    uint32_t quotient = __umulhi(number, reciprocal);  // at most 1 too small
    remainder = number - quotient * divisor;
    if (remainder >= divisor) {
      ++quotient;
      remainder -= divisor;
    }
    return quotient;
  }
};

struct TilesEightBitArguments {
  CUtensorMap weight;  // boxes of kColumns / cluster_rows rows; with SwiGLU alternately 8 gate rows and their 8 up rows
  CUtensorMap x;       // boxes of kEightBitRows / cluster_columns rows
  CUtensorMap y;       // boxes of a slot; of codes in pairs
  const void* bias;
  const float* weight_scales;
  const float* x_scales;
  const float* y_scale;
  int4* sums;               // of parts of tiles
  int32_t columns;          // of y
  int32_t rows;             // of x
  int32_t chunks;           // of 128 k
  int32_t cluster_rows;     // blocks of a cluster, one below the other
  int32_t cluster_columns;  // blocks side by side
  int32_t row_tiles;        // of clusters
  int32_t column_tiles;
  EightBitDivisor band_tiles;   // the tiles of a band of row tiles
  EightBitDivisor band_height;  // the row tiles of a band
  EightBitDivisor last_height;  // of the last one
  int32_t whole_tiles;          // the first tiles
  int32_t shares;               // all, those of whole tiles included
  int32_t tile_columns;         // kColumns
  bool swiglu;
  bool block_scales;  // weight_scales are of blocks, and have been applied to sums; else of rows
  bool x_scale_per_row;
  bool quantized_y;
  bool bfloat16;  // bias, and y where it is not quantized
  bool constant_weight;
};

// Chunks of one tile of a cluster: a share's, or a part of it.
struct EightBitPart {
  int tile;
  int first_chunk;
  int chunks;
  int share;
};

// The first chunk of a share, counted over all tiles. The share is not of a whole tile.
__device__ __forceinline__ int64_t first_chunk_of_share(const TilesEightBitArguments& p, int share) {
  const int divided_tiles = p.row_tiles * p.column_tiles - p.whole_tiles;
  return static_cast<int64_t>(p.whole_tiles) * p.chunks +
         static_cast<int64_t>(divided_tiles) * p.chunks * (share - p.whole_tiles) / (p.shares - p.whole_tiles);
}

// The parts that a cluster multiplies.
class EightBitParts {
 public:
  __device__ __forceinline__ explicit EightBitParts(const TilesEightBitArguments& p) : p_(p), share_(cluster_index()) {
    begin_share();
  }
  __device__ __forceinline__ bool done() const { return share_ >= p_.shares; }
  __device__ __forceinline__ const EightBitPart& part() const { return part_; }
  __device__ __forceinline__ void advance() {
    left_ -= part_.chunks;
    if (left_ > 0) {
      ++part_.tile;
      part_.first_chunk = 0;
      part_.chunks = min(left_, p_.chunks);
    } else {
      share_ += num_clusters();
      begin_share();
    }
  }

 private:
  __device__ __forceinline__ void begin_share() {
    if (done()) return;
    if (share_ < p_.whole_tiles) {  // without the divisions
      left_ = p_.chunks;
      part_ = {share_, 0, p_.chunks, share_};
      return;
    }
    const int64_t first = first_chunk_of_share(p_, share_);
    left_ = static_cast<int>(first_chunk_of_share(p_, share_ + 1) - first);
    part_.share = share_;
    part_.tile = static_cast<int>(first / p_.chunks);
    part_.first_chunk = static_cast<int>(first - static_cast<int64_t>(part_.tile) * p_.chunks);
    part_.chunks = min(left_, p_.chunks - part_.first_chunk);
  }

  const TilesEightBitArguments& p_;
  int share_;
  int left_ = 0;  // chunks of the share
  EightBitPart part_{};
};

// The tile of a block: its first row of x, and which of the column tiles.
struct EightBitTile {
  int first_row, column_tile;

  // The order of tiles: bands of rows, and column after column in a band, so that the clusters that run at the same
  // time read few rows of x and few weights, which the L2 cache holds. The block is at `row` and `column` of its
  // cluster.
  __device__ __forceinline__ EightBitTile(const TilesEightBitArguments& p, int index, int row, int column) {
    uint32_t within, row_tile;
    const uint32_t above = p.band_tiles.divide(index, within) * p.band_height.divisor;
    const bool is_last = p.row_tiles - above < p.band_height.divisor;
    const uint32_t cluster_column = (is_last ? p.last_height : p.band_height).divide(within, row_tile);
    first_row = (static_cast<int>(above + row_tile) * p.cluster_rows + row) * kEightBitRows;
    column_tile = static_cast<int>(cluster_column) * p.cluster_columns + column;
  }
};

// A block's place in its cluster, and the addresses in its shared memory.
template <int kColumns>
struct EightBitBlock {
  using Layout = EightBitLayout<kColumns>;
  const TilesEightBitArguments& p;
  const uint32_t ring;  // at a multiple of 1024
  const uint32_t results = ring + Layout::kRingBytes;
  const uint32_t pairs = results + Layout::kSlotsBytes;
  const uint32_t barriers = results + Layout::kResultBytes;
  const int rank = cluster_block_rank();
  const int row = rank / p.cluster_columns;
  const int column = rank % p.cluster_columns;

  __device__ __forceinline__ EightBitBlock(const TilesEightBitArguments& arguments, uint32_t shared)
      : p(arguments), ring(shared) {}

  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ __forceinline__ uint32_t x(int stage) const { return ring + stage * Layout::kStageBytes; }
  __device__ __forceinline__ uint32_t weights(int stage) const { return x(stage) + kEightBitXBytes; }

  // The blocks that load what this block needs, and that need what it loads: those with the same rows of x, and those
  // with the same weight rows.
  __device__ __forceinline__ int neighbours() const { return p.cluster_rows + p.cluster_columns - 1; }
  __device__ __forceinline__ int neighbour(int i) const {
    if (i < p.cluster_columns) return row * p.cluster_columns + i;
    const int other = i - p.cluster_columns;  // among the other rows
    return (other + (other >= row ? 1 : 0)) * p.cluster_columns + column;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < Layout::kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), kEightBitGroups * neighbours());
    }
    fence_mbarrier_init();
  }
  // A barrier of all threads of the cluster: a block may write to another's shared memory only after that has
  // initialised its mbarriers, and while it still runs.
  __device__ __forceinline__ void sync_cluster() const {
    cluster_arrive();
    cluster_wait();
  }
};

// The producer warp: loads all chunks of the block's parts, as many stages ahead as the ring buffer has. The whole warp
// runs the loops though one lane loads, so that the compiler knows addresses and coordinates to be the same in all
// lanes, as TMA needs them.
template <int kColumns>
class EightBitProducer {
 public:
  __device__ __forceinline__ explicit EightBitProducer(const EightBitBlock<kColumns>& block)
      : block_(block), p_(block.p), parts_(block.p) {
    const int row = block.row, column = block.column;
    weight_offset_ = row * (kColumns / p_.cluster_rows);
    x_offset_ = column * (kEightBitRows / p_.cluster_columns);
    for (int i = 0; i < p_.cluster_columns; ++i) same_rows_ |= 1 << (row * p_.cluster_columns + i);
    for (int i = 0; i < p_.cluster_rows; ++i) same_columns_ |= 1 << (i * p_.cluster_columns + column);
    begin_part();
  }

  // Load the weights of the first stages, and, after wait_for_previous_kernel(), their x.
  __device__ __forceinline__ void load_first_weights() {
#pragma unroll 1
    for (int stage = 0; stage < Layout::kStages && !parts_.done(); ++stage, advance()) load_weights(stage);
  }
  __device__ __forceinline__ void load_first_x() const {
    EightBitProducer first(block_);
#pragma unroll 1
    for (int stage = 0; stage < Layout::kStages && !first.parts_.done(); ++stage, first.advance()) first.load_x(stage);
  }
  __device__ __forceinline__ void load_the_rest() {
    for (PipelineState state; !parts_.done(); state.advance(Layout::kStages), advance()) {
      mbarrier_wait(block_.empty(state.stage), state.parity);
      load_weights(state.stage);
      load_x(state.stage);
    }
  }

 private:
  using Layout = EightBitLayout<kColumns>;

  __device__ __forceinline__ void advance() {
    k_ += kBlockK;
    if (--chunks_left_ > 0) return;
    parts_.advance();
    begin_part();
  }
  // Divisions take long: once for each part, and not for each chunk.
  __device__ __forceinline__ void begin_part() {
    if (parts_.done()) return;
    const EightBitTile tile(p_, parts_.part().tile, block_.row, block_.column);
    weight_row_ = tile.column_tile * kColumns + weight_offset_;
    x_row_ = tile.first_row + x_offset_;
    k_ = parts_.part().first_chunk * kBlockK;
    chunks_left_ = parts_.part().chunks;
  }
  // Also expects the bytes of x, and what other blocks load.
  __device__ __forceinline__ void load_weights(int stage) const {
    const uint32_t to = block_.weights(stage) + weight_offset_ * kSwizzleBytes;
    // Coordinates: encode_weight_tensor_map.
    const int c1 = p_.swiglu ? 0 : weight_row_, c3 = p_.swiglu ? weight_row_ / 16 : 0;
    if (is_loading_lane()) {
      mbarrier_arrive_expect_tx(block_.full(stage), Layout::kStageBytes);
      if (p_.cluster_rows == 1) {
        tma_load_4d_multicast<1>(to, p_.weight, block_.full(stage), k_, c1, 0, c3);
      } else {
        tma_load_4d_to_blocks(same_columns_, to, p_.weight, block_.full(stage), k_, c1, 0, c3);
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ void load_x(int stage) const {
    const uint32_t to = block_.x(stage) + x_offset_ * kSwizzleBytes;
    if (is_loading_lane()) {
      if (p_.cluster_columns == 1) {
        tma_load_2d(to, p_.x, block_.full(stage), k_, x_row_);
      } else {
        tma_load_2d_to_blocks(same_rows_, to, p_.x, block_.full(stage), k_, x_row_);
      }
    }
    __syncwarp();
  }
  static __device__ __forceinline__ bool is_loading_lane() { return threadIdx.x % 32 == 0; }

  const EightBitBlock<kColumns>& block_;
  const TilesEightBitArguments& p_;
  int weight_offset_, x_offset_;  // the first of a tile's rows that this block loads
  uint16_t same_rows_ = 0, same_columns_ = 0;
  EightBitParts parts_;
  int weight_row_ = 0, x_row_ = 0, k_ = 0, chunks_left_ = 0;
};

// The epilogue of a warpgroup for kColumns weight rows: a thread has two rows of x, g and g + 8 of its warp's 16 (g =
// lane / 4), times two of every 8 weight rows. With SwiGLU 8 gate rows are followed by their 8 up rows.
template <typename Sum, int kColumns>
class EightBitResults {
 public:
  static constexpr int kTiles = kColumns / 8;

  // `slots` are the warp's, `pairs` the warpgroup's.
  __device__ __forceinline__ EightBitResults(const TilesEightBitArguments& p, int group, uint32_t slots, uint32_t pairs)
      : p_(p), group_(group), slots_(slots), pairs_(pairs) {
    if (p.quantized_y) y_factor_ = finite_reciprocal(*p.y_scale);
  }

  // Loads scales and bias for the warpgroup's rows of x and columns of y from these on: each thread a pair of weight
  // rows, of which write() tells the others.
  __device__ __forceinline__ void begin(int first_row, int first_column) {
    first_row_ = first_row + 16 * warp_;
    first_column_ = first_column;
    const int tile = thread_ / 4;
    const int column = first_column + 8 * (p_.swiglu ? tile / 2 : tile) + thread_ % 4 * 2;
    const int row = column + (p_.swiglu && tile % 2 == 1 ? p_.columns : 0);
    bias_ = 0;
    scales_ = make_float2(1.0F, 1.0F);
    if (thread_ < kColumns / 2 && column < p_.columns) {
      if (p_.bias != nullptr) bias_ = static_cast<const uint32_t*>(p_.bias)[row / 2];
      if (!p_.block_scales) scales_ = reinterpret_cast<const float2*>(p_.weight_scales)[row / 2];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int x_row = first_row_ + lane_ / 4 + 8 * half;
      x_scales_[half] = x_row < p_.rows ? p_.x_scales[p_.x_scale_per_row ? x_row : 0] : 0.0F;
    }
  }

  // Stores y from its sums.
  __device__ __forceinline__ void write(const Sum (&sums)[kTiles][4]) {
    warpgroup_sync(1 + group_);  // the pairs of the tile before have been read
    if (thread_ < kColumns / 2) {
      const float2 bias = bias_pair();
      store_shared(pairs_ + thread_ * kPairBytes, {scales_.x, scales_.y, bias.x, bias.y});
    }
    warpgroup_sync(1 + group_);
    if (p_.swiglu) {
      write_as_type<true>(sums);
    } else {
      write_as_type<false>(sums);
    }
  }

 private:
  struct Codes {};  // the type of quantized y

  template <bool kSwiglu>
  __device__ __forceinline__ void write_as_type(const Sum (&sums)[kTiles][4]) {
    if (p_.quantized_y) {
      write_slots<kSwiglu, Codes>(sums);
    } else if (p_.bfloat16) {
      write_slots<kSwiglu, __nv_bfloat16>(sums);
    } else {
      write_slots<kSwiglu, __half>(sums);
    }
  }
  template <bool kSwiglu, typename Y>
  __device__ __forceinline__ void write_slots(const Sum (&sums)[kTiles][4]) {
    if (lane_ == 0) tma_store_wait_read<0>();  // the tile before
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kColumns / kSlotRows; ++i) {
      const uint32_t slot = slots_ + i * kSlotBytes;
      constexpr int kTogether = kSwiglu ? 2 : 4;  // tiles of y: 4 of sums
#pragma unroll
      for (int j = 0; j < kSlotTiles<kSwiglu>; j += kTogether) {
        const int first = (i * kSlotTiles<kSwiglu> + j) * 4 / kTogether;
        float pairs[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) load_shared(pairs[k], pairs_ + ((first + k) * 4 + lane_ % 4) * kPairBytes);
#pragma unroll
        for (int k = 0; k < kTogether; k += 2) {
          uint32_t words[4];
          results<kSwiglu, Y>(words[0], words[1], sums, first, pairs, k);
          results<kSwiglu, Y>(words[2], words[3], sums, first, pairs, k + 1);
          stage<kSlotTiles<kSwiglu>, Y>(slot, j + k, words);
        }
      }
      fence_proxy_async();  // the store reads it
      __syncwarp();
      if (lane_ == 0) {
        const int column = first_column_ + 8 * i * kSlotTiles<kSwiglu>;
        tma_store_2d(p_.y, slot, std::is_same_v<Y, Codes> ? column / 2 : column, first_row_);
      }
    }
  }

  // Two neighbouring elements of a tile of y, in rows g and g + 8: of tile `k` among those of 4 tiles of sums.
  template <bool kSwiglu, typename Y>
  __device__ __forceinline__ void results(uint32_t& word, uint32_t& next_word, const Sum (&sums)[kTiles][4], int first,
                                          const float (&pairs)[4][4], int k) const {
    const int tile = kSwiglu ? 2 * k : k;
    float z[4];
    scale(z, sums[first + tile], pairs[tile]);
    if constexpr (kSwiglu) {
      float up[4];
      scale(up, sums[first + tile + 1], pairs[tile + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) z[i] = silu<__half>(z[i]) * up[i];
    }
    word = pack<Y>(z[0], z[1]);
    next_word = pack<Y>(z[2], z[3]);
  }
  __device__ __forceinline__ void scale(float (&z)[4], const Sum (&sums)[4], const float (&pair)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      z[i] = fmaf(static_cast<float>(sums[i]) * pair[i % 2], x_scales_[i / 2], pair[2 + i % 2]);
  }
  __device__ __forceinline__ float2 bias_pair() const {
    if (p_.bfloat16) return make_float2(bit_cast<float>(bias_ << 16), bit_cast<float>(bias_ & 0xffff0000U));
    return __half22float2(bit_cast<__half2>(bias_));
  }
  // 16-bit elements, or codes in the lower half.
  template <typename Y>
  __device__ __forceinline__ uint32_t pack(float low, float high) const {
    if constexpr (std::is_same_v<Y, Codes>) {
      low *= y_factor_;
      high *= y_factor_;
      if constexpr (std::is_same_v<Sum, int32_t>) return __byte_perm(to_int8_bits(low), to_int8_bits(high), 0x0040);
      return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
    } else {
      return pack_pair<Y>(low, high);
    }
  }
  // Writes two tiles' words into a slot: for both tiles those of rows g, then those of rows g + 8. Chunks of 16 bytes
  // are permuted by the swizzle of the tensor map, whose bytes are those of a slot's row.
  template <int kRowTiles, typename Y>
  __device__ __forceinline__ void stage(uint32_t slot, int tile, const uint32_t (&words)[4]) const {
    constexpr bool kCodes = std::is_same_v<Y, Codes>;
    constexpr int kRowBytes = kRowTiles * (kCodes ? 8 : 16);
    constexpr int kRowChunks = kRowBytes / 16;
    const auto permuted = [](int chunk, int row) { return chunk ^ (row / (8 / kRowChunks) % kRowChunks); };
    if constexpr (kCodes) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = lane_ / 4 + j % 2 * 8;
        store_shared_16(slot + row * kRowBytes + permuted(tile / 2, row) * 16 + j / 2 * 8 + lane_ % 4 * 2, words[j]);
      }
    } else {
      const int row = lane_ % 16;
      stmatrix_x4(slot + row * kRowBytes + permuted(tile + lane_ / 16, row) * 16, words);
    }
  }

  const TilesEightBitArguments& p_;
  const int group_;
  const int thread_ = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp_ = __shfl_sync(0xffffffffU, thread_ / 32, 0);
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const uint32_t slots_, pairs_;
  int first_row_ = 0, first_column_ = 0;  // of the warp
  uint32_t bias_ = 0;
  float2 scales_;
  float x_scales_[2];
  float y_factor_ = 1.0F;
};

// Where a warpgroup's sums of a part are in the workspace, in the order in which its threads have them. A share has two
// places: at most its first part begins within a tile, and at most its last is a part that begins a tile.
__device__ __forceinline__ int4* partial_sums(const TilesEightBitArguments& p, int share, bool begins_tile, int rank,
                                              int group) {
  const int64_t index =
      (int64_t{2} * (share - p.whole_tiles) + (begins_tile ? 1 : 0)) * p.cluster_rows * p.cluster_columns + rank;
  return p.sums + (index * kEightBitGroups + group) * (p.tile_columns / 8 * kWarpgroupThreads);
}

// A consumer warpgroup.
template <typename Sum, int kColumns, bool kBlockScales>
class TilesEightBitConsumer {
 public:
  __device__ __forceinline__ TilesEightBitConsumer(const EightBitBlock<kColumns>& block, int warp)
      : block_(block),
        p_(block.p),
        group_(warp / 4),
        releases_(static_cast<int>(threadIdx.x) % kWarpgroupThreads < block.neighbours()),
        released_(map_to_block(block.empty(0), releases_ ? block.neighbour(threadIdx.x % kWarpgroupThreads) : 0)),
        results_(block.p, group_, block.results + warp * Layout::kWarpSlotsBytes,
                 block.pairs + group_ * Layout::kPairsBytes) {}

  __device__ __forceinline__ void run() {
    const EightBitParts parts(p_);
    if (parts.done()) return;
    // The second warpgroup is a chunk behind, so that one multiplies while the other stores.
    if (group_ == 1 && parts.part().chunks > 1) mbarrier_wait(block_.full(1), 0);
    if constexpr (kIsInt8) {
      multiply_parts(parts);
    } else {
      add_parts(parts);
    }
    bulk_store_wait();
  }

 private:
  static constexpr bool kIsInt8 = std::is_same_v<Sum, int32_t>;
  static constexpr int kTiles = kColumns / 8;
  using Layout = EightBitLayout<kColumns>;
  static constexpr int kHalves = !kIsInt8 && kColumns == 256 ? 2 : 1;
  static constexpr int kChunkTiles = kTiles / kHalves;  // that are multiplied at a time
  using Sums = Sum[kTiles][4];
  using ChunkSums = Sum[kChunkTiles][4];

  // Issues a chunk's wgmmas as one group; the sums begin with them if not `accumulate`.
  __device__ __forceinline__ void start_chunk(ChunkSums& sums, bool accumulate) {
    mbarrier_wait(block_.full(state_.stage), state_.parity);
    start_loaded_chunk(sums, accumulate);
  }
  // Likewise, of a half of the weight rows where there are halves.
  __device__ __forceinline__ void start_loaded_chunk(ChunkSums& sums, bool accumulate, int half = 0) {
    // A step of k is 32 bytes further, 2 in the units of a descriptor: stages begin at multiples of 1024 bytes.
    constexpr int kStep = 32 / 16;
    const uint64_t x = matrix_descriptor(block_.x(state_.stage) + group_ * 64 * kSwizzleBytes, 16);
    const uint64_t weights =
        matrix_descriptor(block_.weights(state_.stage) + half * kChunkTiles * 8 * kSwizzleBytes, 16);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSwizzleBytes / 32; ++step) {
      wgmma_of_codes(sums, x + step * kStep, weights + step * kStep, accumulate || step > 0);
    }
    wgmma_commit_group();
  }
  // Releases a stage to the producers of all blocks that write to it.
  __device__ __forceinline__ void release(int stage) const {
    if (releases_) mbarrier_arrive_remote(released_ + 16 * stage);
  }

  __device__ __forceinline__ void multiply_parts(EightBitParts parts) {
    for (; !parts.done(); parts.advance()) {
      multiply(parts.part());
      write(sums_, parts.part());
    }
  }
  __device__ __forceinline__ void multiply(const EightBitPart& part) {
    start_chunk(sums_, false);
    begin_part(part);
    for (int chunk = 1; chunk < part.chunks; ++chunk) {
      const int previous_stage = state_.stage;
      state_.advance(Layout::kStages);
      start_chunk(sums_, true);
      wgmma_wait_group<1>();
      release(previous_stage);
    }
    wgmma_wait_group<0>();
    release(state_.stage);
    state_.advance(Layout::kStages);
  }

  // Adds the sums of chunks. The first chunk of a part is multiplied while the results of the part before are stored.
  // wgmma is issued at one place in the code, whose registers no branch goes around: else the compiler would wait
  // there. So after the last part stale memory is multiplied once more, to no effect.
  __device__ __forceinline__ void add_parts(EightBitParts parts) {
    clear_totals();
    EightBitPart added{};
    for (int chunk = 0;;) {
      const bool starts = !parts.done();
      if (starts) mbarrier_wait(block_.full(state_.stage), state_.parity);
      start_loaded_chunk(sums_, false);
      if (added.chunks > 0) {
        write(totals_, added);
        clear_totals();
        added.chunks = 0;
      }
      if (!starts) break;
      if (chunk == 0) begin_part(parts.part());
      float scales[2];
      next_block_scales(scales, chunk + 1 < parts.part().chunks);
      wgmma_wait_group<0>();
      if constexpr (kHalves == 2) {
        add_to_totals(0, scales);
        start_loaded_chunk(sums_, false, 1);
        wgmma_wait_group<0>();
      }
      release(state_.stage);
      state_.advance(Layout::kStages);
      add_to_totals(kHalves - 1, scales);
      if (++chunk < parts.part().chunks) continue;
      added = parts.part();
      parts.advance();
      chunk = 0;
    }
    wgmma_wait_group<0>();
  }
  __device__ __forceinline__ void add_to_totals(int half, const float (&scales)[2]) {
#pragma unroll
    for (int i = 0; i < kChunkTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& total = totals_[half * kChunkTiles + i][j];
        if constexpr (kBlockScales) total = fmaf(scales[i % 2], sums_[i][j], total);
        if constexpr (!kBlockScales) total += sums_[i][j];
      }
    }
  }
  __device__ __forceinline__ void clear_totals() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) totals_[i][0] = totals_[i][1] = totals_[i][2] = totals_[i][3] = 0.0F;
  }
  __device__ __forceinline__ void begin_part(const EightBitPart& part) {
    const EightBitTile tile(p_, part.tile, block_.row, block_.column);
    results_.begin(tile.first_row + 64 * group_, tile.column_tile * (p_.swiglu ? kColumns / 2 : kColumns));
    if constexpr (kBlockScales) {
      static_assert(kColumns == kEightBitBlock);
      const int row = tile.column_tile * (p_.swiglu ? kColumns / 2 : kColumns);
      const int rows[2] = {row, row + (p_.swiglu ? p_.columns : 0)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // The last tile of a cluster may be outside of the weight.
        const int block = row < p_.columns ? rows[i] / kEightBitBlock : 0;
        block_scales_[i] = p_.weight_scales + static_cast<int64_t>(block) * p_.chunks + part.first_chunk;
        next_block_scales_[i] = __ldg(block_scales_[i]);
      }
    }
  }
  // Gives the scales of a chunk, with SwiGLU of gate and up rows, and loads those of the next, where there is one.
  __device__ __forceinline__ void next_block_scales(float (&scales)[2], bool has_next) {
    if constexpr (kBlockScales) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales[i] = next_block_scales_[i];
        if (has_next) next_block_scales_[i] = __ldg(++block_scales_[i]);
      }
    }
  }

  // Stores the results of a whole tile, or the sums of a part.
  __device__ __forceinline__ void write(const Sums& sums, const EightBitPart& part) {
    if (part.chunks == p_.chunks) {
      results_.write(sums);
    } else {
      write_sums(sums, part);
    }
  }
  __device__ __forceinline__ void write_sums(const Sums& sums, const EightBitPart& part) const {
    int4* const to =
        partial_sums(p_, part.share, part.first_chunk == 0, block_.rank, group_) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      to[i * kWarpgroupThreads] = make_int4(bit_cast<int32_t>(sums[i][0]), bit_cast<int32_t>(sums[i][1]),
                                            bit_cast<int32_t>(sums[i][2]), bit_cast<int32_t>(sums[i][3]));
    }
  }

  const EightBitBlock<kColumns>& block_;
  const TilesEightBitArguments& p_;
  const int group_;
  const bool releases_;      // this thread, to one block
  const uint32_t released_;  // the first stage's mbarrier of that block
  EightBitResults<Sum, kColumns> results_;
  PipelineState state_;
  ChunkSums sums_;  // of e4m3, of a chunk or of half of it
  Sums totals_;     // of e4m3
  const float* block_scales_[2];
  float next_block_scales_[2];
};

template <typename Sum, int kColumns, bool kBlockScales>
__global__ void __launch_bounds__(kEightBitThreads, 1)
    gemm_eight_bit_tiles(const __grid_constant__ TilesEightBitArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(1024) char shared[];
  const EightBitBlock<kColumns> block(p, shared_address(shared));
  // The shuffle tells the compiler that the value is the same in all lanes.
  const int warp = __shfl_sync(0xffffffffU, static_cast<int>(threadIdx.x) / 32, 0);
  constexpr int kFirstProducerThread = kWarpgroupThreads * kEightBitGroups;
  constexpr int kProducerWarp = kFirstProducerThread / 32;
  if (static_cast<int>(threadIdx.x) == kFirstProducerThread) {
    prefetch_tensor_map(p.weight);
    prefetch_tensor_map(p.x);
    block.init_barriers();
  }
  block.sync_cluster();
  // Sums do not fit into a third of the registers.
  if (warp >= kProducerWarp) {
    release_registers<40>();
    if (warp == kProducerWarp) {
      EightBitProducer<kColumns> producer(block);
      if (!p.constant_weight) wait_for_previous_kernel();
      producer.load_first_weights();
      wait_for_previous_kernel();
      producer.load_first_x();
      producer.load_the_rest();
    }
  } else {
    take_registers<232>();
    wait_for_previous_kernel();
    TilesEightBitConsumer<Sum, kColumns, kBlockScales> consumer(block, warp);
    consumer.run();
  }
  block.sync_cluster();  // other blocks may still write here
}

// Adds the sums of a tile's parts. For each beginning of a share that is the first one within a tile (x, together with
// a block of the cluster and a warpgroup), and each kAddedColumns weight rows of the tile (y), a block.
constexpr int kAddedColumns = kSlotRows;

template <typename Sum>
__global__ void __launch_bounds__(kWarpgroupThreads)
    gemm_eight_bit_tiles_add(const __grid_constant__ TilesEightBitArguments p) {
  trigger_dependent_launch();
  __shared__ __align__(1024) char slots[4 * kSlotBytes];
  __shared__ __align__(16) char pairs[kAddedColumns / 2 * kPairBytes];
  const int group = static_cast<int>(blockIdx.x) % kEightBitGroups;
  const int block = static_cast<int>(blockIdx.x) / kEightBitGroups;
  const int blocks = p.cluster_rows * p.cluster_columns;
  const int rank = block % blocks;
  int share = p.whole_tiles + block / blocks;  // that has the tile's beginning
  wait_for_previous_kernel();
  const int64_t within = first_chunk_of_share(p, share + 1);
  const int64_t first = within / p.chunks * p.chunks;  // chunk of the tile
  if (within == first || first_chunk_of_share(p, share) > first) return;
  const EightBitTile tile(p, static_cast<int>(first / p.chunks), rank / p.cluster_columns, rank % p.cluster_columns);
  const int first_weight_row = tile.column_tile * p.tile_columns + static_cast<int>(blockIdx.y) * kAddedColumns;
  EightBitResults<Sum, kAddedColumns> results(p, 0, shared_address(slots) + threadIdx.x / 32 * kSlotBytes,
                                              shared_address(pairs));
  results.begin(tile.first_row + 64 * group, p.swiglu ? first_weight_row / 2 : first_weight_row);
  constexpr int kTiles = kAddedColumns / 8;
  Sum sums[kTiles][4] = {};
  for (bool begins_tile = true; first_chunk_of_share(p, share) < first + p.chunks; ++share, begins_tile = false) {
    const int4* const from = partial_sums(p, share, begins_tile, rank, group) +
                             static_cast<int>(blockIdx.y) * kTiles * kWarpgroupThreads + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int4 more = from[i * kWarpgroupThreads];
      sums[i][0] += bit_cast<Sum>(more.x);
      sums[i][1] += bit_cast<Sum>(more.y);
      sums[i][2] += bit_cast<Sum>(more.z);
      sums[i][3] += bit_cast<Sum>(more.w);
    }
  }
  results.write(sums);
  bulk_store_wait();
}

}  // namespace qwen_plugins
