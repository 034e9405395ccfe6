// The streaming GEMM of quantized weights for up to 64 rows on Hopper: reads the packed weight once, at the speed of
// memory.
//
// A warp-specialised persistent kernel. Weight rows are operand a of mma.m16n8k16, 32 for each consumer warp, or with
// more than 16 rows of x of wgmma, 64 for each consumer warpgroup; rows of x are operand b. A lane loads 16 bytes of
// codes, which are whole operands (packed_weight.h), turns them into code - zero in the type of x, which is exact, and
// multiplies. The sums of a group of k are scaled in float32. Nothing is rounded before the end. With one or two rows
// of x, which the consumers turn into integers first, codes of int4 are operands as they are (integer_rows.cuh).
//
// One warp issues bulk copies of a tile's codes, scales and zeros, 128 k (a chunk) at a time, another TMA loads of the
// same k of x, into a ring buffer that runs on from tile to tile. The warps of a block divide the rows of the tile
// among them, and where these are few, also its chunks (k warps). The blocks of a cluster may split k as well. Partial
// sums are sent to the block that owns their part of the result, through distributed shared memory, and added there,
// always in the same order.
//
// As in gemm_stream a block is launched while the previous kernel runs (programmatic dependent launch), and fills its
// ring buffer with weights before it waits for that kernel. Some variants take less than half of a multiprocessor, so
// that the next launch's block fits beside this one.
#pragma once

#include <cuda.h>

#include "hopper_operands.h"
#include "integer_rows.cuh"
#include "kernels/common/arithmetic.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/common/wgmma.cuh"
#include "packed_weight.h"
#include "silu.cuh"

namespace qwen_plugins {

constexpr int kQuantizedProducerWarps = 2;  // of the weight and of x
constexpr int kQuantizedMaxStages = 32;
constexpr int kQuantizedBarrierBytes = 2048;  // and what aligns the ring to 1024 bytes
constexpr int kXBoxK = kBlockK;               // k of a TMA load of x
static_assert(16 * kQuantizedMaxStages + 1023 <= kQuantizedBarrierBytes && kPackedK == 2 * kXBoxK);

// By the tiles of 8 rows of x; 0 tiles: up to kIntegerRows rows, as integers, for int4 with a scale for 128 k or more.
constexpr bool quantized_uses_integers(int x_tiles) { return x_tiles == 0; }
constexpr int quantized_item_tiles(int x_tiles) { return x_tiles == 0 ? 1 : x_tiles; }
// From 17 rows of x on (3 tiles of 8 rows), warpgroups multiply with wgmma instead of warps with mma.
constexpr bool quantized_uses_wgmma(int x_tiles) { return x_tiles > 2; }
// By the tiles of 8 rows of x: blocks of 16 weight rows of a warp, the warps among which rows are divided together, and
// the warps that multiply for which there are registers.
constexpr int quantized_warp_blocks(int x_tiles) { return quantized_uses_wgmma(x_tiles) ? 1 : 2; }
constexpr int quantized_row_warps(int x_tiles) { return quantized_uses_wgmma(x_tiles) ? 4 : 1; }
constexpr int quantized_max_consumers(int x_tiles) {
  return x_tiles == 0 ? 22 : x_tiles == 1 ? 18 : x_tiles == 2 ? 14 : x_tiles == 4 ? 16 : 12;
}
// Likewise of a block that takes less than half of a multiprocessor; 0: there are too few registers.
constexpr int quantized_max_consumers_of_half(int x_tiles) {
  return x_tiles == 0 ? 10 : x_tiles == 1 ? 8 : x_tiles == 2 ? 6 : 0;
}

struct StreamQuantizedArguments {
  CUtensorMap x;          // not set for integers
  const void* integer_x;  // x, for these
  int64_t x_row_stride;   // elements
  int32_t in_features;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;
  const void* bias;
  void* y;
  int32_t columns;       // of y
  int32_t rows;          // of x
  int32_t chunks;        // of 128 k: those of each split, and
  int32_t extra_chunks;  // the first splits that have one more
  int32_t row_blocks;    // blocks of 16 rows of the padded weight
  int32_t used_blocks;   // of these, that have columns of y; with SwiGLU of the gate
  int32_t up_blocks;     // from a gate block to its up block
  int32_t tile_blocks;   // that a tile loads, with SwiGLU of the gate
  int32_t tiles;
  int32_t splits;           // blocks of a cluster that split k
  uint32_t splits_inverse;  // 65536 / splits, rounded up
  int32_t row_warps;        // warps that divide the rows of a tile
  uint32_t row_warps_inverse;
  int32_t k_warps;  // warps that divide its chunks
  int32_t stages;
  int32_t groups_of_chunk;  // groups of 128 k; 0: one group of all k
  int32_t stage_stride;     // bytes, and where scales and zeros are in a stage
  int32_t scales_offset;
  int32_t zeros_offset;
  int32_t received_bytes;  // of one of the two buffers for partial sums
  int32_t x_offset;        // of the integers, from the ring
  bool swiglu;
  bool bfloat16_scales;
  bool writes_pairs;  // y and its rows begin at multiples of 4 bytes
  bool constant_weight;
};

// Where things are in a stage of the ring buffer, in bytes: x, codes, scales, zeros.
struct QuantizedStage {
  int codes, scales, zeros;
  int stride;  // of stages: x begins at multiples of 1024

  __host__ __device__ constexpr QuantizedStage(int x_tiles, int bits, int blocks, int groups_of_chunk, bool has_zeros)
      : codes(x_tiles * 8 * kPackedK * 2),
        scales(codes + blocks * kPackedRows * kPackedK * bits / 8),
        zeros(scales + groups_of_chunk * blocks * kPackedRows * 2),
        stride(divide_up(zeros + (has_zeros ? groups_of_chunk * blocks * kPackedRows : 0), 1024) * 1024) {}
};

// An item is the result of 16 weight rows times a tile of 8 rows of x: 16 bytes of partial sums a lane.
constexpr int kItemBytes = kPackedRows * 8 * 4;
// Bytes for the partial sums that a block receives for one tile.
constexpr int quantized_received_bytes(int x_tiles, int row_warps, int k_warps, int splits) {
  if (k_warps * splits == 1 && quantized_uses_wgmma(x_tiles)) return 0;
  const int items = quantized_warp_blocks(x_tiles) * row_warps * quantized_item_tiles(x_tiles);
  return divide_up(items, splits) * splits * k_warps * kItemBytes;
}

// value / divisor for small numbers, by the inverse of the divisor: instructions that run once in a block take the time
// to fetch them, and a division is many.
__device__ __forceinline__ int divide(int value, uint32_t inverse) {
  return static_cast<int>(static_cast<uint32_t>(value) * inverse >> 16);
}

// --- Codes to operands: code - zero, exactly.

// 1024 + code is exact in float16, 128 + code in bfloat16, where codes are below 16: a code in the lower bits of a
// half.
template <typename T>
constexpr uint32_t kCodeBase = std::is_same_v<T, __half> ? 0x64006400U : 0x43004300U;

template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    return bit_cast<uint32_t>(__hadd2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  } else {
    return bit_cast<uint32_t>(__hadd2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
}

// (word & mask) | base in one instruction.
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t mask, uint32_t base) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(base));
  return result;
}

// The zero point of a row, as to_pairs adds it.
template <typename T, int kBits>
struct ZeroPoint {
  uint32_t low, high;

  __device__ __forceinline__ void set(uint32_t zero) {
    if constexpr (kBits == 8 && std::is_same_v<T, __nv_bfloat16>) {
      low = bit_cast<uint32_t>(-8388608.0F - static_cast<float>(zero));
    } else {
      low = (kCodeBase<T> | 0x80008000U) + zero * 0x00010001U;
      high = 0xd400d400U + zero * 0x00100010U;  // -(64 + zero) in float16, for codes in the upper bits of a byte
    }
  }
};

// The pairs of a word of codes, in the order of the word: 4 of int4, 2 of int8.
template <typename T, int kBits>
__device__ __forceinline__ void to_pairs(uint32_t word, const ZeroPoint<T, kBits>& zero,
                                         uint32_t (&pairs)[16 / kBits]) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (kBits == 4 && kHalf) {
    const __half2 sixteenth = bit_cast<__half2>(0x2c002c00U);
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      pairs[i] = add_pairs<T>(and_or(word, 0x000f000fU, kCodeBase<T>), zero.low);
      const uint32_t high = and_or(word, 0x00f000f0U, kCodeBase<T>);  // 1024 + 16 code
      pairs[i + 1] = bit_cast<uint32_t>(__hfma2(bit_cast<__half2>(high), sixteenth, bit_cast<__half2>(zero.high)));
      word >>= 8;
    }
  } else if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = add_pairs<T>(and_or(word >> (4 * i), 0x000f000fU, kCodeBase<T>), zero.low);
    }
  } else if constexpr (kHalf) {
    pairs[0] = add_pairs<T>(__byte_perm(word, kCodeBase<T>, 0x5250), zero.low);
    pairs[1] = add_pairs<T>(__byte_perm(word, kCodeBase<T>, 0x5351), zero.low);
  } else {
    // A bfloat16 cannot hold 128 + code: by way of the float32 number 2^23 + code.
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = bit_cast<float>(__byte_perm(word, 0x4b000000U, 0x7550 + i)) + bit_cast<float>(zero.low);
    }
    // Integers of up to 8 bits: their float32's upper halves.
    pairs[0] = __byte_perm(bit_cast<uint32_t>(values[0]), bit_cast<uint32_t>(values[2]), 0x7632);
    pairs[1] = __byte_perm(bit_cast<uint32_t>(values[1]), bit_cast<uint32_t>(values[3]), 0x7632);
  }
}

// Codes of int4 as subnormal float16 numbers, in as few instructions as there can be: the pairs of a word are codes *
// 2^-24, but pairs 1 and 3 with kSeparate codes * 2^-20. Their zero point is subtracted from sums: of a group,
// scale * (sum of code * x - zero * sum of x).
template <bool kSeparate>
__device__ __forceinline__ void to_subnormal_pairs(uint32_t word, uint32_t (&pairs)[4]) {
  constexpr uint32_t kLow = 0x000f000fU, kHigh = 0x00f000f0U;
  pairs[0] = word & kLow;
  pairs[1] = kSeparate ? word & kHigh : word >> 4 & kLow;
  pairs[2] = word >> 8 & kLow;
  pairs[3] = kSeparate ? word >> 8 & kHigh : word >> 12 & kLow;
}

__device__ __forceinline__ void load_shared_words(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from));
}
__device__ __forceinline__ void load_shared_words(uint32_t& first, uint32_t& second, uint32_t from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(from));
}
__device__ __forceinline__ void store_to_block(uint32_t mapped_to, const float (&v)[4]) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(mapped_to), "f"(v[0]), "f"(v[1]), "f"(v[2]),
               "f"(v[3])
               : "memory");
}

// --- A block's part of the GEMM, and the layout of its shared memory.
template <int kBits, int kXTiles>
struct QuantizedBlock {
  const StreamQuantizedArguments& p;
  const int parts = p.swiglu ? 2 : 1;  // gate and up
  const int split = p.splits == 1 ? 0 : cluster_block_rank();
  const int first_tile = p.splits == 1 ? static_cast<int>(blockIdx.x) : cluster_index();
  const int tile_step = p.splits == 1 ? static_cast<int>(gridDim.x) : num_clusters();
  const int first_chunk = split * p.chunks + min(split, p.extra_chunks);
  const int chunks = p.chunks + (split < p.extra_chunks ? 1 : 0);  // of a tile
  static constexpr bool kUsesIntegers = quantized_uses_integers(kXTiles);
  static constexpr int kCodesOffset = kXTiles * 8 * kPackedK * 2;  // in a stage: behind x
  const uint32_t barriers;
  const uint32_t ring = (barriers + 16 * kQuantizedMaxStages + 1023) / 1024 * 1024;
  const uint32_t received = ring + p.stages * p.stage_stride;

  __device__ __forceinline__ QuantizedBlock(const StreamQuantizedArguments& arguments, uint32_t shared)
      : p(arguments), barriers(shared) {}

  __device__ __forceinline__ uint32_t full(int s) const { return barriers + 16 * s; }
  __device__ __forceinline__ uint32_t empty(int s) const { return barriers + 16 * s + 8; }
  // By a warp: a lane for each stage.
  __device__ __forceinline__ void init_barriers() const {
    const int s = static_cast<int>(threadIdx.x) % 32;
    if (s < p.stages) {
      mbarrier_init(full(s), kUsesIntegers ? 1 : 2);  // producers
      mbarrier_init(empty(s), p.row_warps);
    }
    fence_mbarrier_init();
  }
  // By a producer warp, when it has loaded a tile: waits for the barrier of the cluster before that of this tile, and
  // arrives at this one, which the consumers wait for.
  __device__ __forceinline__ void pass_cluster_barrier() const {
    if (p.splits == 1) return;
    __syncwarp();
    cluster_wait_aligned();
    cluster_arrive();
  }
};

// The bulk copies of a chunk of the weight, each by one lane: codes, the scales of each group, the zeros of each group;
// with SwiGLU each of the gate and of up.
template <int kBits, int kXTiles>
class QuantizedProducer {
 public:
  __device__ __forceinline__ explicit QuantizedProducer(const QuantizedBlock<kBits, kXTiles>& block) : block_(block) {
    const StreamQuantizedArguments& p = block.p;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int part = p.swiglu ? lane % 2 : 0, kind = p.swiglu ? lane / 2 : lane, groups = p.groups_of_chunk;
    copies_ = kind < 1 + groups * (p.zeros == nullptr ? 1 : 2);
    const int64_t first_block = static_cast<int64_t>(part) * p.up_blocks;
    if (kind == 0) {
      bytes_of_block_ = kPackedRows * kPackedK * kBits / 8;
      from_ = p.codes;
      chunk_stride_ = static_cast<int64_t>(p.row_blocks) * bytes_of_block_;
      to_ = block.ring + block.kCodesOffset;
    } else {
      const bool zeros = kind > groups;
      const int group = (kind - 1) & (groups - 1);
      bytes_of_block_ = zeros ? kPackedRows : 2 * kPackedRows;
      const int64_t row_bytes = static_cast<int64_t>(p.row_blocks) * bytes_of_block_;
      from_ = (zeros ? p.zeros : reinterpret_cast<const uint8_t*>(p.scales)) + group * row_bytes;
      chunk_stride_ = groups * row_bytes;
      to_ = block.ring + (zeros ? p.zeros_offset : p.scales_offset) +
            group * block.parts * p.tile_blocks * bytes_of_block_;
    }
    from_ += first_block * bytes_of_block_;
    to_ += part * p.tile_blocks * bytes_of_block_;
  }

  // By the whole warp.
  __device__ __forceinline__ void load_all() {
    const StreamQuantizedArguments& p = block_.p;
    const bool leads = threadIdx.x % 32 == 0;
    const uint64_t policy = evict_first_policy();
    PipelineState state;
    int free_stages = p.stages;
    for (int tile = block_.first_tile; tile < p.tiles; tile += block_.tile_step) {
      const int first_block = tile * p.tile_blocks;
      const int blocks = min(p.tile_blocks, p.used_blocks - first_block);
      const int bytes = blocks * bytes_of_block_;
      const int all_bytes =
          blocks * block_.parts *
          (kPackedRows * kPackedK * kBits / 8 + p.groups_of_chunk * kPackedRows * (p.zeros == nullptr ? 2 : 3));
      const uint8_t* from =
          from_ + block_.first_chunk * chunk_stride_ + first_block * static_cast<int64_t>(bytes_of_block_);
      for (int chunk = 0; chunk < block_.chunks; ++chunk, from += chunk_stride_, state.advance(p.stages)) {
        if (--free_stages < 0) mbarrier_wait(block_.empty(state.stage), state.parity ^ 1);
        const uint32_t full = block_.full(state.stage);
        if (leads) mbarrier_arrive_expect_tx(full, all_bytes);
        __syncwarp();
        if (copies_) bulk_load(to_ + state.stage * p.stage_stride, from, bytes, full, policy);
      }
      block_.pass_cluster_barrier();
    }
  }

 private:
  const QuantizedBlock<kBits, kXTiles>& block_;
  const uint8_t* from_;   // of chunk 0 of the first block
  int64_t chunk_stride_;  // bytes
  uint32_t to_;           // in stage 0
  int bytes_of_block_;    // that a block of 16 rows has of this lane's array in a chunk
  bool copies_;           // this lane has something to copy
};

// Loads x, by one lane of a warp, but for integers.
template <int kBits, int kXTiles>
__device__ __forceinline__ void produce_quantized_x(const QuantizedBlock<kBits, kXTiles>& block) {
  const StreamQuantizedArguments& p = block.p;
  const uint64_t policy = evict_last_policy();
  const int end_chunk = threadIdx.x % 32 == 0 && !block.kUsesIntegers ? block.first_chunk + block.chunks : 0;
  PipelineState state;
  int free_stages = p.stages;
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step) {
    for (int chunk = block.first_chunk; chunk < end_chunk; ++chunk, state.advance(p.stages)) {
      if (--free_stages < 0) mbarrier_wait(block.empty(state.stage), state.parity ^ 1);
      const uint32_t full = block.full(state.stage), to = block.ring + state.stage * p.stage_stride;
      mbarrier_arrive_expect_tx(full, block.kCodesOffset);
      tma_load_2d(to, p.x, full, policy, chunk * kPackedK, 0);
      tma_load_2d(to + block.kCodesOffset / 2, p.x, full, policy, chunk * kPackedK + kXBoxK, 0);
    }
    block.pass_cluster_barrier();
  }
}

// A consumer warp. Its block of 16 rows is one of the weight's, or with SwiGLU 8 gate rows and the 8 up rows that
// belong to them: a lane has a row of the first 8 and one of the second 8.
template <typename T, int kBits, int kXTiles>
class QuantizedConsumer {
 public:
  __device__ __forceinline__ explicit QuantizedConsumer(const QuantizedBlock<kBits, kXTiles>& block)
      : block_(block), p(block.p) {
    // The matrices of x are the k of the pairs that one mma instruction multiplies (load_operands), but those of digits
    // are in order.
    const bool in_order = kBits == 8 || kUsesIntegers;
    const int matrix = lane_ / 8, pack = in_order ? matrix : matrix % 2 * 2 + matrix / 2;
    x_ = lane_ % 8 * 128 + ((pack ^ lane_ % 8) << 4);
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Warps of a warpgroup for which there are no rows read the last ones.
        const int index = kUsesWgmma ? min(row_warp_, block.parts * p.tile_blocks - 1) : kWarpBlocks * row_warp_ + r;
        const int slot = p.swiglu ? h * p.tile_blocks + index / 2 : index, half = p.swiglu ? index % 2 : h;
        codes_[r][h] = block.kCodesOffset + slot * kSuperblockBytes + 16 * lane_ + 8 * half;
        row_[r][h] = slot * kPackedRows + lane_ / 4 + 8 * half;
        if (!kSubtractsFromSums) set_zero(r, h, kMiddle);
      }
    }
  }

  // Turns the block's chunks of x into integers, with the other consumer warps.
  __device__ __forceinline__ void load_integers() const {
    const int consumers = p.row_warps * p.k_warps;
    uint32_t pairs[kIntegerRows][2], next_pairs[kIntegerRows][2];
    const auto load = [&](int chunk, uint32_t (&to)[kIntegerRows][2]) {
      const int first = (block_.first_chunk + chunk) * kPackedK;
      const int k = chunk < block_.chunks ? p.in_features - first : 0;
      load_integer_chunk(static_cast<const T*>(p.integer_x) + first, p.x_row_stride, p.rows, k, to);
    };
    load(warp_, pairs);
    for (int chunk = warp_; chunk < block_.chunks; chunk += consumers) {
      load(chunk + consumers, next_pairs);  // on its way while this one is written
      write_integer_chunk<T>(pairs, p.rows, integers_of(chunk));
#pragma unroll
      for (int row = 0; row < kIntegerRows; ++row) {
#pragma unroll
        for (int i = 0; i < 2; ++i) pairs[row][i] = next_pairs[row][i];
      }
    }
    asm volatile("barrier.sync 1, %0;" ::"r"(32 * consumers) : "memory");
  }

  // Multiplies the tile's chunks, whose numbers among all that the block loads end before `end_number`.
  __device__ __forceinline__ void multiply_tile(int tile, int end_number) {
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < kItemTiles; ++i) sums_[r][i][0] = sums_[r][i][1] = sums_[r][i][2] = sums_[r][i][3] = 0.0F;
    }
    if (p.groups_of_chunk == 0) load_scales_of_rows(tile);
    if constexpr (kUsesIntegers) {
      p.swiglu ? multiply_integers<true>(end_number) : multiply_integers<false>(end_number);
    } else if (p.groups_of_chunk <= 1) {
      p.swiglu ? multiply_chunks_of_one_group<true>(end_number) : multiply_chunks_of_one_group<false>(end_number);
    } else {
      p.swiglu ? multiply_chunks<true, true>(end_number) : multiply_chunks<false, true>(end_number);
    }
  }

  // Whether the sums are whole, so that nothing is to be exchanged.
  __device__ __forceinline__ bool has_whole_sums() const { return kUsesWgmma && p.splits * p.k_warps == 1; }
  // Writes whole sums.
  __device__ __forceinline__ void write_sums(int tile) {
    load_bias(tile, row_warp_);
#pragma unroll
    for (int i = 0; i < kItemTiles; ++i) write_item(tile, row_warp_, i, sums_[0][i]);
  }
  // Sends the partial sums to the blocks that own their items. `buffer` is where those receive them.
  __device__ __forceinline__ void send_sums(uint32_t buffer) const {
    const int part = block_.split * p.k_warps + k_warp_;
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < kItemTiles; ++i) {
        const int item = (row_warp_ * kWarpBlocks + r) * kItemTiles + i;
        const int index = divide(item, p.splits_inverse);
        const uint32_t to = received(buffer, index, part);
        store_to_block(p.splits == 1 ? to : map_to_block(to, item - index * p.splits), sums_[r][i]);
      }
    }
  }
  // Loads the bias of the first item that finish_items writes: before the barrier between the two.
  __device__ __forceinline__ void load_first_bias(int tile) { load_bias(tile, first_item() / kItemTiles); }
  // Adds the partial sums of the items that the block owns, each by one warp, and writes them.
  __device__ __forceinline__ void finish_items(int tile, uint32_t buffer) {
    const int consumers = p.row_warps * p.k_warps, parts = p.splits * p.k_warps;
    uint32_t from = received(buffer, warp_, 0);
#pragma unroll 1
    for (int item = first_item(); item < kWarpBlocks * p.row_warps * kItemTiles; item += consumers * p.splits) {
      if (item != first_item()) load_bias(tile, item / kItemTiles);
      float sums[4] = {};
#pragma unroll 2
      for (int part = 0; part < parts; ++part) {
        float more[4];
        load_shared(more, from + part * kItemBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] += more[j];
      }
      from += consumers * parts * kItemBytes;
      write_item(tile, item / kItemTiles, item % kItemTiles, sums);
    }
  }

 private:
  static constexpr bool kUsesIntegers = quantized_uses_integers(kXTiles);
  static constexpr bool kUsesWgmma = quantized_uses_wgmma(kXTiles);
  static constexpr int kItemTiles = quantized_item_tiles(kXTiles);
  static constexpr int kWarpBlocks = quantized_warp_blocks(kXTiles);
  static constexpr int kSteps = kPackedK / 32;  // of 32 k: two mma or wgmma instructions
  static constexpr int kBlocks = kBits / 2;     // of codes, in a chunk
  static constexpr int kBlockSteps = kSteps / kBlocks;
  static constexpr uint32_t kMiddle = 1U << (kBits - 1);
  // For few rows of x: more of them would take more instructions to sum than codes take to convert.
  static constexpr bool kSubtractsFromSums = kBits == 4 && std::is_same_v<T, __half> && kXTiles <= 2 && !kUsesIntegers;
  static constexpr int kSets = kSubtractsFromSums && kXTiles == 1 ? 2 : 1;  // of sums of a group
  static constexpr int kSuperblockBytes = kPackedRows * kPackedK * kBits / 8;

  template <bool kSwiglu>
  __device__ __forceinline__ void multiply_chunks_of_one_group(int end_number) {
    if constexpr (kUsesWgmma) {
      multiply_chunks_with_wgmma<kSwiglu>(end_number);
    } else {
      multiply_chunks<kSwiglu, false>(end_number);
    }
  }
  // The chunk with number n is multiplied by the k warp n % k_warps: always the same for a stage, whose number of
  // chunks is a multiple.
  template <bool kSwiglu, bool kSeveralGroups>
  __device__ __forceinline__ void multiply_chunks(int end_number) {
    for (; number_ < end_number; number_ += p.k_warps) {
      mbarrier_wait(block_.full(state_.stage), state_.parity);
      if constexpr (kUsesWgmma) {
        multiply_chunk_of_groups<kSwiglu>(stage_address());
      } else {
        multiply_chunk<kSwiglu, kSeveralGroups>(stage_address());
      }
      release(state_.stage);
      advance_stage();
    }
  }
  __device__ __forceinline__ uint32_t stage_address() const { return block_.ring + state_.stage * p.stage_stride; }
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(block_.empty(stage));
  }
  __device__ __forceinline__ void advance_stage() {
    state_.stage += p.k_warps;
    if (state_.stage >= p.stages) {  // then it is that of k_warp_
      state_.stage = k_warp_;
      state_.parity ^= 1;
    }
  }

  __device__ __forceinline__ void set_scale(int r, int h, uint16_t bits) {
    scale_[r][h] =
        bfloat16_scales_ ? bit_cast<float>(static_cast<uint32_t>(bits) << 16) : to_float(bit_cast<__half>(bits));
  }
  __device__ __forceinline__ void set_zero(int r, int h, uint32_t zero) {
    if constexpr (kUsesIntegers) {
      integer_zero_[r][h] = static_cast<int32_t>(zero);
    } else if constexpr (kSubtractsFromSums) {
      offset_[r][h] = -scale_[r][h] * static_cast<float>(zero);
    } else {
      zero_[r][h].set(zero);
    }
  }
  // The scales, and zeros, of one group of all k.
  __device__ __forceinline__ void load_scales_of_rows(int tile) {
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int in_tile = row_[r][h] - (p.swiglu ? h * p.tile_blocks * kPackedRows : 0);
        const int block = tile * p.tile_blocks + (p.swiglu ? h * p.up_blocks : 0);
        const int row = block * kPackedRows + in_tile;
        if (row >= p.row_blocks * kPackedRows) continue;
        set_scale(r, h, p.scales[row]);
        set_zero(r, h, p.zeros == nullptr ? kMiddle : p.zeros[row]);
      }
    }
  }
  __device__ __forceinline__ void load_group(uint32_t stage, int group) {
    const int first = group == 0 ? 0 : group * block_.parts * p.tile_blocks * kPackedRows;
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        set_scale(r, h, load_shared_16(stage + p.scales_offset + 2 * (first + row_[r][h])));
      }
    }
    if (kSubtractsFromSums && !has_zeros_) {
#pragma unroll
      for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) offset_[r][h] = -static_cast<float>(kMiddle) * scale_[r][h];
      }
    }
    if (!has_zeros_) return;
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        set_zero(r, h, load_shared_8(stage + p.zeros_offset + first + row_[r][h]));
      }
    }
  }

  // Chunks with one group, of which a warpgroup multiplies 64 rows. Operands are made while the instructions before
  // them multiply; the first ones of the next chunk, too, so that little time passes between the chunks, in which the
  // sums are scaled.
  template <bool kSwiglu>
  __device__ __forceinline__ void multiply_chunks_with_wgmma(int end_number) {
    if (number_ >= end_number) return;
    uint32_t words[2][4];  // of a block of codes and the next
    uint32_t a[2][2][4];
    float group_sums[kXTiles][4];
    mbarrier_wait(block_.full(state_.stage), state_.parity);
    uint32_t stage = stage_address();
    load_words<kSwiglu>(words[0], stage, 0, 0);
    if (p.groups_of_chunk == 1) load_group(stage, 0);
    load_operands_in_order(words[0], 0, a[0]);
    for (bool more = true; more;) {
      const uint64_t x = matrix_descriptor(stage, 16);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int block = step / kBlockSteps;
        if (step % kBlockSteps == 0 && block < kBlocks - 1) {
          load_words<kSwiglu>(words[(block + 1) % 2], stage, 0, block + 1);
        }
        if (step >= 2) wgmma_wait_group<1>();  // that of a[step % 2]
        if (step >= 1) load_operands_in_order(words[block % 2], step % kBlockSteps, a[step % 2]);
        multiply_step(group_sums, a[step % 2], x, step, step == 0);
      }
      const int multiplied = state_.stage;
      const float scale[2] = {scale_[0][0], scale_[0][1]};
      advance_stage();
      number_ += p.k_warps;
      more = number_ < end_number;
      if (more) {
        mbarrier_wait(block_.full(state_.stage), state_.parity);
        stage = stage_address();
        load_words<kSwiglu>(words[0], stage, 0, 0);
        if (p.groups_of_chunk == 1) load_group(stage, 0);
        wgmma_wait_group<1>();
        load_operands_in_order(words[0], 0, a[0]);
      }
      wgmma_wait_group<0>();
      release(multiplied);
      add_scaled(group_sums, scale);
    }
  }
  // A chunk with several groups.
  template <bool kSwiglu>
  __device__ __forceinline__ void multiply_chunk_of_groups(uint32_t stage) {
    uint32_t words[4];
    uint32_t a[2][4];
    float group_sums[kXTiles][4];
    const uint64_t x = matrix_descriptor(stage, 16);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step % kBlockSteps == 0) load_words<kSwiglu>(words, stage, 0, step / kBlockSteps);
      load_group(stage, step * p.groups_of_chunk / kSteps);
      load_operands_in_order(words, step % kBlockSteps, a);
      multiply_step(group_sums, a, x, step, true);
      wgmma_wait_group<0>();
      add_scaled(group_sums, scale_[0]);
    }
  }
  // 32 k of a chunk; `x` is the descriptor of its first k.
  __device__ __forceinline__ void multiply_step(float (&sums)[kXTiles][4], const uint32_t (&a)[2][4], uint64_t x,
                                                int step, bool is_first) const {
    const uint32_t k_offset = step / 2 * (kXTiles * 1024) + step % 2 * 64;
    wgmma_fence();
    if (is_first) {
      wgmma_transposed_first<T>(sums, a[0], moved_descriptor(x, k_offset));
    } else {
      wgmma_transposed<T>(sums, a[0], moved_descriptor(x, k_offset));
    }
    wgmma_transposed<T>(sums, a[1], moved_descriptor(x, k_offset + 32));
    wgmma_commit_group();
  }
  __device__ __forceinline__ void add_scaled(const float (&group_sums)[kXTiles][4], const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < kXTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums_[0][i][j] = fmaf(scale[j / 2], group_sums[i][j], sums_[0][i][j]);
    }
  }

  // The lane's 16 bytes of a block of codes.
  template <bool kSwiglu>
  __device__ __forceinline__ void load_words(uint32_t (&words)[4], uint32_t stage, int r, int block) const {
    const int offset = block * kPackedBlockBytes;
    if (kSwiglu) {
      load_shared_words(words[0], words[1], stage + codes_[r][0] + offset);
      load_shared_words(words[2], words[3], stage + codes_[r][1] + offset);
    } else {
      load_shared_words(words, stage + codes_[r][0] + offset);
    }
  }
  // The operands of 32 k, for two wgmma instructions of 16 consecutive k.
  __device__ __forceinline__ void load_operands_in_order(const uint32_t (&words)[4], int step,
                                                         uint32_t (&a)[2][4]) const {
    const ZeroPoint<T, kBits>(&zero)[2] = zero_[0];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pairs[4];
      if constexpr (kBits == 4) {
        to_pairs<T, 4>(words[2 * h + step], zero[h], pairs);
      } else {
        uint32_t more[2];
        to_pairs<T, 8>(words[2 * h], zero[h], more);
        pairs[0] = more[0];
        pairs[1] = more[1];
        to_pairs<T, 8>(words[2 * h + 1], zero[h], more);
        pairs[2] = more[0];
        pairs[3] = more[1];
      }
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        a[w][h] = pairs[2 * w];
        a[w][2 + h] = pairs[2 * w + 1];
      }
    }
  }

  __device__ __forceinline__ uint32_t integers_of(int chunk) const {
    return block_.ring + p.x_offset + chunk * kIntegerChunkBytes;
  }
  // The chunks of a tile, by integers. A lane has the sums of a pair of digits of a row of x.
  template <bool kSwiglu>
  __device__ __forceinline__ void multiply_integers(int end_number) {
    float sums[kWarpBlocks][2] = {};
    for (; number_ < end_number; number_ += p.k_warps) {
      const uint32_t x = integers_of(number_ - (end_number - block_.chunks));
      mbarrier_wait(block_.full(state_.stage), state_.parity);
      multiply_integer_chunk<kSwiglu>(sums, stage_address(), x);
      release(state_.stage);
      advance_stage();
    }
    // To the places of other kernels' results: lane 4 g has both rows of x, the other lanes have rows that are not
    // there.
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float row = sums[r][h] + __shfl_xor_sync(0xffffffffU, sums[r][h], 1);
        const float other_row = __shfl_xor_sync(0xffffffffU, row, 2);
        if (lane_ % 4 != 0) continue;
        sums_[r][0][2 * h] = row;
        sums_[r][0][2 * h + 1] = other_row;
      }
    }
  }
  template <bool kSwiglu>
  __device__ __forceinline__ void multiply_integer_chunk(float (&sums)[kWarpBlocks][2], uint32_t stage, uint32_t x) {
    constexpr uint32_t kCodes = 0x0f0f0f0fU;
    uint32_t digits[2][4], words[kWarpBlocks][kBlocks][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) ldmatrix_x4(digits[half], x + (x_ ^ half * (kPackedK / 2)));
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) load_words<kSwiglu>(words[r][block], stage, r, block);
    }
    uint32_t scale_and_sum[2];
    load_shared_words(scale_and_sum[0], scale_and_sum[1], x + kIntegerDigitBytes + lane_ % 4 * 8);
    if (p.groups_of_chunk == 1) load_group(stage, 0);
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
      int32_t products[4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t (&block)[4] = words[r][step / 2];
        const uint32_t g = block[step % 2], g8 = block[2 + step % 2];
        const uint32_t a[4] = {g & kCodes, g8 & kCodes, g >> 4 & kCodes, g8 >> 4 & kCodes};
        mma_m16n8k32(products, a, digits[step / 2][2 * (step % 2)], digits[step / 2][2 * (step % 2) + 1]);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int32_t product =
            products[2 * h] * 256 + products[2 * h + 1] - integer_zero_[r][h] * static_cast<int32_t>(scale_and_sum[1]);
        sums[r][h] = fmaf(scale_[r][h] * bit_cast<float>(scale_and_sum[0]), static_cast<float>(product), sums[r][h]);
      }
    }
  }

  // kSeveralGroups: there are 2 or 4 groups in a chunk. Branches between the steps would keep them from overlapping.
  template <bool kSwiglu, bool kSeveralGroups>
  __device__ __forceinline__ void multiply_chunk(uint32_t stage) {
    const uint32_t x = stage + x_;
    if (!kSeveralGroups && p.groups_of_chunk == 1) load_group(stage, 0);
    constexpr int kFoldSteps = kSubtractsFromSums && !kSeveralGroups ? kSteps : 1;  // after which sums are scaled
    uint32_t words[kWarpBlocks][4];
    float group_sums[kWarpBlocks][kXTiles][kSets][4];
    float x_sums[kXTiles][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (kSeveralGroups) load_group(stage, step * p.groups_of_chunk / kSteps);
#pragma unroll
      for (int r = 0; r < kWarpBlocks; ++r) {
        if (kBits == 4 && step % 2 == 1) continue;  // a block has two steps
        const int offset = (kBits == 4 ? step / 2 : step) * kPackedBlockBytes;
        if (kSwiglu) {
          load_shared_words(words[r][0], words[r][1], stage + codes_[r][0] + offset);
          load_shared_words(words[r][2], words[r][3], stage + codes_[r][1] + offset);
        } else {
          load_shared_words(words[r], stage + codes_[r][0] + offset);
        }
      }
      uint32_t a[kWarpBlocks][2][4];  // of two mma instructions
#pragma unroll
      for (int r = 0; r < kWarpBlocks; ++r) load_operands(words[r], step % 2, zero_[r], a[r]);
#pragma unroll
      for (int i = 0; i < kXTiles; ++i) {
        uint32_t b[4];
        ldmatrix_x4(b, (x + step / 2 * (kXTiles * 1024) + i * 1024) ^ (step % 2 * 64));
#pragma unroll
        for (int j = 0; j < 4 && step % kFoldSteps == 0; ++j) {
          x_sums[i][j] = 0.0F;
#pragma unroll
          for (int r = 0; r < kWarpBlocks; ++r) group_sums[r][i][0][j] = group_sums[r][i][kSets - 1][j] = 0.0F;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < kWarpBlocks; ++r) {
            mma_m16n8k16<T>(group_sums[r][i][half * (kSets - 1)], a[r][half], b[2 * half], b[2 * half + 1]);
          }
          if (kSubtractsFromSums) {
            constexpr uint32_t kOnes[4] = {0x3c003c00U, 0x3c003c00U, 0x3c003c00U, 0x3c003c00U};
            mma_m16n8k16<T>(x_sums[i], kOnes, b[2 * half], b[2 * half + 1]);
          }
        }
        if (step % kFoldSteps == kFoldSteps - 1) scale_sums(group_sums, x_sums, i);
      }
    }
  }
  __device__ __forceinline__ void scale_sums(const float (&group_sums)[kWarpBlocks][kXTiles][kSets][4],
                                             const float (&x_sums)[kXTiles][4], int i) {
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&sums)[kSets][4] = group_sums[r][i];
        float& all = sums_[r][i][j];
        if constexpr (!kSubtractsFromSums) {
          all = fmaf(scale_[r][j / 2], sums[0][j], all);
        } else {
          all = fmaf(offset_[r][j / 2], x_sums[i][j], all);
          all = fmaf(0x1p24F * scale_[r][j / 2], sums[0][j], all);
          if (kSets == 2) all = fmaf(0x1p20F * scale_[r][j / 2], sums[kSets - 1][j], all);
        }
      }
    }
  }
  // The operands of 32 k. A word of int4 has pairs of two rows of k, k + 8, k + 16 and k + 24: the first instruction
  // multiplies k and k + 16, the second the others. Two words of int8 have one instruction each.
  __device__ __forceinline__ void load_operands(const uint32_t (&words)[4], int step,
                                                const ZeroPoint<T, kBits> (&zero)[2], uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kBits == 4) {
        uint32_t pairs[4];
        if constexpr (kSubtractsFromSums) {
          to_subnormal_pairs<kSets == 2>(words[2 * h + step], pairs);
        } else {
          to_pairs<T, 4>(words[2 * h + step], zero[h], pairs);
        }
        a[0][h] = pairs[0];
        a[0][2 + h] = pairs[2];
        a[1][h] = pairs[1];
        a[1][2 + h] = pairs[3];
      } else {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          uint32_t pairs[2];
          to_pairs<T, 8>(words[2 * h + w], zero[h], pairs);
          a[w][h] = pairs[0];
          a[w][2 + h] = pairs[1];
        }
      }
    }
  }

  static __device__ __forceinline__ int warp_of_thread() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    // The shuffle tells the compiler that the value, and control flow by it, is the same in all lanes, as wgmma needs
    // it.
    return kUsesWgmma ? __shfl_sync(0xffffffffU, warp, 0) : warp;
  }
  __device__ __forceinline__ int first_item() const { return block_.split + warp_ * p.splits; }
  // Where a block receives part `part` of the sums of the `index`-th item that it owns.
  __device__ __forceinline__ uint32_t received(uint32_t buffer, int index, int part) const {
    return buffer + (index * p.splits * p.k_warps + part) * kItemBytes + lane_ * 16;
  }

  // The first column of y of a tile's block, which has 16, or 8 with SwiGLU.
  __device__ __forceinline__ int first_column(int tile, int block) const {
    return tile * p.tile_blocks * kPackedRows + block * (p.swiglu ? 8 : 16);
  }
  __device__ __forceinline__ void load_bias(int tile, int block) {
    bias_[0] = bias_[1] = 0.0F;
    if (p.bias == nullptr) return;
    const T* const bias = static_cast<const T*>(p.bias);
    const int column = first_column(tile, block) + lane_ / 4;
    if (column < p.columns) bias_[0] = to_float(bias[column]);
    if (p.swiglu) {
      if (column < p.columns) bias_[1] = to_float(bias[column + p.columns]);
    } else if (column + 8 < p.columns) {
      bias_[1] = to_float(bias[column + 8]);
    }
  }
  // Writes 8 rows times 16 columns of y, or 8 columns with SwiGLU. A lane has two rows of one column (or of two, 8
  // apart), and gets two columns of one row.
  __device__ __forceinline__ void write_item(int tile, int block, int x_tile, const float (&sums)[4]) const {
    const float z[4] = {sums[0] + bias_[0], sums[1] + bias_[0], sums[2] + bias_[1], sums[3] + bias_[1]};
    const int row = 8 * x_tile + lane_ / 4, column = first_column(tile, block) + 2 * (lane_ % 4);
    const int end_column = min(p.columns, (tile + 1) * p.tile_blocks * kPackedRows);
    if (p.swiglu) {
      const uint32_t pair = movmatrix_trans(pack_pair<T>(silu<T>(z[0]) * z[2], silu<T>(z[1]) * z[3]));
      write_pair(row, column, end_column, pair);
    } else {
      const uint32_t pairs[2] = {movmatrix_trans(pack_pair<T>(z[0], z[1])), movmatrix_trans(pack_pair<T>(z[2], z[3]))};
      write_pair(row, column, end_column, pairs[0]);
      write_pair(row, column + 8, end_column, pairs[1]);
    }
  }
  __device__ __forceinline__ void write_pair(int row, int column, int end_column, uint32_t pair) const {
    if (row < p.rows) {
      uint16_t* const to = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(row) * p.columns + column;
      if (p.writes_pairs) {  // then there is an even number of columns
        if (column < end_column) *reinterpret_cast<uint32_t*>(to) = pair;
      } else {
        if (column < end_column) to[0] = static_cast<uint16_t>(pair);
        if (column + 1 < end_column) to[1] = static_cast<uint16_t>(pair >> 16);
      }
    }
    __syncwarp();
  }

  const QuantizedBlock<kBits, kXTiles>& block_;
  const StreamQuantizedArguments& p;
  const int warp_ = warp_of_thread();
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const int k_warp_ = divide(warp_, p.row_warps_inverse);
  const int row_warp_ = warp_ - k_warp_ * p.row_warps;
  int number_ = k_warp_;  // of the next chunk that this warp multiplies
  PipelineState state_{k_warp_, 0};
  // Offsets in a stage, of this lane: bytes of x (of its digits, in a chunk) and codes, rows among the scales of a
  // group.
  uint32_t x_, codes_[kWarpBlocks][2];
  int row_[kWarpBlocks][2];
  const bool has_zeros_ = p.zeros != nullptr;
  const bool bfloat16_scales_ = p.bfloat16_scales;
  ZeroPoint<T, kBits> zero_[kWarpBlocks][2];
  float scale_[kWarpBlocks][2];
  float offset_[kWarpBlocks][2];  // -scale * zero
  float bias_[2];                 // of an item
  int32_t integer_zero_[kWarpBlocks][2];
  float sums_[kWarpBlocks][kItemTiles][4];
};

template <typename T, int kBits, int kXTiles>
__global__ void __launch_bounds__(32 * (quantized_max_consumers(kXTiles) + kQuantizedProducerWarps), 1)
    gemm_quantized(const __grid_constant__ StreamQuantizedArguments p) {
  trigger_dependent_launch();
  extern __shared__ char shared[];
  const QuantizedBlock<kBits, kXTiles> block(p, shared_address(shared));
  const int consumers = p.row_warps * p.k_warps;
  const int warp = static_cast<int>(threadIdx.x) / 32 - consumers;  // 0 and more: producers
  if (warp == 0) {
    block.init_barriers();
  } else if (!block.kUsesIntegers && warp == 1 && threadIdx.x % 32 == 0) {
    prefetch_tensor_map(p.x);
  }
  __syncthreads();
  if (p.splits > 1) cluster_arrive_relaxed_aligned();
  if (warp == 0) {
    if (!p.constant_weight) wait_for_previous_kernel();
    QuantizedProducer<kBits, kXTiles>(block).load_all();
  } else if (warp == 1) {
    wait_for_previous_kernel();
    produce_quantized_x(block);
  }
  __syncwarp();
  // The other blocks have started: their shared memory can be written. Producers wait for the barrier of the last tile.
  if (p.splits > 1) cluster_wait_aligned();
  if (warp >= 0) return;
  if (!p.constant_weight) wait_for_previous_kernel();
  QuantizedConsumer<T, kBits, kXTiles> consumer(block);
  if constexpr (block.kUsesIntegers) {
    wait_for_previous_kernel();
    consumer.load_integers();
  }
  int end_number = block.chunks;
  uint32_t buffer = block.received, other_buffer = buffer + p.received_bytes;
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step, end_number += block.chunks) {
    consumer.multiply_tile(tile, end_number);
    if (consumer.has_whole_sums()) {
      if (p.constant_weight) wait_for_previous_kernel();
      consumer.write_sums(tile);
      continue;
    }
    consumer.send_sums(buffer);
    consumer.load_first_bias(tile);
    if (p.splits > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      asm volatile("barrier.sync 1, %0;" ::"r"(32 * consumers) : "memory");
    }
    if (p.constant_weight) wait_for_previous_kernel();
    consumer.finish_items(tile, buffer);
    // The next tile's sums go to the other buffer: one barrier is enough.
    const uint32_t finished = buffer;
    buffer = other_buffer;
    other_buffer = finished;
  }
}

}  // namespace qwen_plugins
