// The streaming GEMM of quantized weights for few rows on Hopper: reads the packed weight once, at the speed of memory.
//
// A warp-specialised persistent kernel. Weight rows are operand a of mma.m16n8k16, 32 for each consumer warp, rows of x
// are operand b. A lane loads 16 bytes of codes, which are whole operands (packed_weight.h), turns them into code - zero
// in the type of x, which is exact, and multiplies. The sums of a group of k are scaled in float32. Nothing is rounded
// before the end.
//
// One warp issues bulk copies of a tile's codes, scales and zeros, 128 k (a chunk) at a time, another TMA loads of the
// same k of x, into a ring buffer that runs on from tile to tile. The warps of a block divide the rows of the tile among
// them, and where these are few, also its chunks (k warps). The blocks of a cluster may split k as well. Partial sums are
// sent to the block that owns their part of the result, through distributed shared memory, and added there, always in
// the same order.
//
// As in gemm_stream a block is launched while the previous kernel runs (programmatic dependent launch). With up to 16
// rows of x it takes less than half of a multiprocessor, so that the next launch's block fits beside it and fills its
// ring buffer while this one multiplies and writes its last chunks: the memory is never idle between two GEMMs.
#pragma once

#include <cuda.h>

#include "hopper_operands.h"
#include "kernels/common/arithmetic.h"
#include "kernels/common/hopper.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "packed_weight.h"
#include "silu.cuh"

namespace qwen_plugins {

constexpr int kQuantizedProducerWarps = 2;  // of the weight and of x
constexpr int kQuantizedMaxStages = 16;
constexpr int kQuantizedBarrierBytes = 1024;  // and what aligns x to 1024 bytes
constexpr int kWarpBlocks = 2;                // blocks of 16 weight rows of a warp
constexpr int kXBoxK = kBlockK;               // k of a TMA load of x
static_assert(3 * kQuantizedMaxStages * 8 <= kQuantizedBarrierBytes && kPackedK == 2 * kXBoxK);

// The warps that multiply, at most. With more rows of x there are registers for fewer.
constexpr int quantized_max_consumers(int x_tiles) { return x_tiles == 2 ? 6 : 10; }
constexpr int quantized_blocks_per_multiprocessor(int x_tiles) { return x_tiles <= 2 ? 2 : 1; }

struct StreamQuantizedArguments {
  CUtensorMap x;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;
  const void* bias;
  void* y;
  int32_t columns;          // of y
  int32_t rows;             // of x
  int32_t chunks;           // of 128 k
  int32_t row_blocks;       // blocks of 16 rows of the padded weight
  int32_t used_blocks;      // of these, that have columns of y; with SwiGLU of the gate
  int32_t up_blocks;        // from a gate block to its up block
  int32_t tile_blocks;      // of a tile, with SwiGLU of the gate
  int32_t tiles;
  int32_t splits;           // blocks of a cluster that split k
  int32_t row_warps;        // warps that divide the rows of a tile
  int32_t k_warps;          // warps that divide its chunks
  int32_t stages;
  int32_t groups_of_chunk;  // groups of 128 k; 0: one group of all k
  bool swiglu;
  bool bfloat16_scales;
  bool writes_pairs;  // y and its rows begin at multiples of 4 bytes
  bool constant_weight;
};

// Sizes in bytes of what a block holds in shared memory.
struct QuantizedStage {
  int x, codes, scales, zeros;
  __host__ __device__ constexpr int total() const { return x + codes + scales + zeros; }
};
__host__ __device__ constexpr QuantizedStage quantized_stage(int x_tiles, int bits, int blocks, int groups_of_chunk,
                                                             bool has_zeros) {
  return {x_tiles * 8 * kPackedK * 2, blocks * kPackedRows * kPackedK * bits / 8,
          groups_of_chunk * blocks * kPackedRows * 2, has_zeros ? groups_of_chunk * blocks * kPackedRows : 0};
}

// An item is the result of a warp's 32 weight rows times a tile of 8 rows of x: 1 KB of partial sums, 32 bytes a lane.
constexpr int kItemBytes = kWarpBlocks * kPackedRows * 8 * 4;
// Bytes for the partial sums that a block receives for one tile.
constexpr int quantized_received_bytes(int x_tiles, int row_warps, int k_warps, int splits) {
  return splits * k_warps == 1 ? 0 : divide_up(row_warps * x_tiles, splits) * splits * k_warps * kItemBytes;
}

// --- Codes to operands.

// Two elements of T from two numbers below 16 (or 256) in the lower bits of the halves, each or-ed with kBase: exact
// float16 numbers 1024 + code, or bfloat16 numbers 128 + code.
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

// The zero point of a row, as the code's conversion subtracts it.
template <typename T, int kBits>
struct ZeroPoint {
  // Of int4 in float16: -(1024 + zero), -(64 + zero); otherwise the first alone, or its float32 in 8 bits of bfloat16.
  uint32_t low, high;

  __device__ __forceinline__ void set(uint32_t zero) {
    if constexpr (kBits == 8 && std::is_same_v<T, __nv_bfloat16>) {
      low = bit_cast<uint32_t>(-8388608.0F - static_cast<float>(zero));
    } else {
      low = (kCodeBase<T> | 0x80008000U) + zero * 0x00010001U;
      high = 0xd400d400U + zero * 0x00100010U;
    }
  }
};

// The pairs of a word of codes, minus the zero point, in the order of the word: 4 of int4, 2 of int8.
template <typename T, int kBits>
__device__ __forceinline__ void to_pairs(uint32_t word, const ZeroPoint<T, kBits>& zero, uint32_t (&pairs)[16 / kBits]) {
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
    // A bfloat16 cannot hold 256 + code: by way of the float32 number 2^23 + code.
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

__device__ __forceinline__ void load_shared_words(uint32_t (&words)[4], uint32_t from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from));
}
__device__ __forceinline__ uint32_t load_shared_8(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(value) : "r"(from));
  return value;
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
  const int first_chunk = p.chunks * split / p.splits;
  const int chunks = p.chunks * (split + 1) / p.splits - first_chunk;  // of a tile
  const QuantizedStage stage =
      quantized_stage(kXTiles, kBits, parts * p.tile_blocks, p.groups_of_chunk, p.zeros != nullptr);
  const uint32_t barriers;
  const uint32_t x_ring = (barriers + kQuantizedBarrierBytes) / 1024 * 1024;
  const uint32_t codes_ring = x_ring + p.stages * stage.x;
  const uint32_t scales_ring = codes_ring + p.stages * stage.codes;
  const uint32_t zeros_ring = scales_ring + p.stages * stage.scales;
  const uint32_t received = (zeros_ring + p.stages * stage.zeros + 127) / 128 * 128;

  __device__ __forceinline__ QuantizedBlock(const StreamQuantizedArguments& arguments, uint32_t shared)
      : p(arguments), barriers(shared) {}

  __device__ __forceinline__ uint32_t weight_full(int s) const { return barriers + 24 * s; }
  __device__ __forceinline__ uint32_t x_full(int s) const { return barriers + 24 * s + 8; }
  __device__ __forceinline__ uint32_t empty(int s) const { return barriers + 24 * s + 16; }
  // By a warp: a lane for each stage.
  __device__ __forceinline__ void init_barriers() const {
    const int s = static_cast<int>(threadIdx.x) % 32;
    if (s < p.stages) {
      mbarrier_init(weight_full(s), 1);
      mbarrier_init(x_full(s), 1);
      mbarrier_init(empty(s), p.row_warps);
    }
    fence_mbarrier_init();
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
    const int part = lane % block.parts, kind = lane / block.parts, groups = p.groups_of_chunk;
    copies_ = kind < 1 + groups * (p.zeros == nullptr ? 1 : 2);
    const int64_t first_block = static_cast<int64_t>(part) * p.up_blocks;
    if (kind == 0) {
      bytes_of_block_ = kPackedRows * kPackedK * kBits / 8;
      from_ = p.codes;
      chunk_stride_ = static_cast<int64_t>(p.row_blocks) * bytes_of_block_;
      to_ = block.codes_ring;
      stage_stride_ = block.stage.codes;
    } else {
      const bool zeros = kind > groups;
      const int group = (kind - 1) % max(groups, 1);
      bytes_of_block_ = zeros ? kPackedRows : 2 * kPackedRows;
      const int64_t row_bytes = static_cast<int64_t>(p.row_blocks) * bytes_of_block_;
      from_ = (zeros ? p.zeros : reinterpret_cast<const uint8_t*>(p.scales)) + group * row_bytes;
      chunk_stride_ = groups * row_bytes;
      to_ = (zeros ? block.zeros_ring : block.scales_ring) + group * block.parts * p.tile_blocks * bytes_of_block_;
      stage_stride_ = zeros ? block.stage.zeros : block.stage.scales;
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
      const int all_bytes = blocks * block_.parts *
                            (kPackedRows * kPackedK * kBits / 8 +
                             p.groups_of_chunk * kPackedRows * (p.zeros == nullptr ? 2 : 3));
      const uint8_t* from = from_ + block_.first_chunk * chunk_stride_ + first_block * static_cast<int64_t>(bytes_of_block_);
      for (int chunk = 0; chunk < block_.chunks; ++chunk, from += chunk_stride_, state.advance(p.stages)) {
        if (--free_stages < 0) mbarrier_wait(block_.empty(state.stage), state.parity ^ 1);
        if (leads) mbarrier_arrive_expect_tx(block_.weight_full(state.stage), all_bytes);
        __syncwarp();
        if (copies_) bulk_load(to_ + state.stage * stage_stride_, from, bytes, block_.weight_full(state.stage), policy);
      }
    }
  }

 private:
  const QuantizedBlock<kBits, kXTiles>& block_;
  const uint8_t* from_;    // of chunk 0 of the first block
  int64_t chunk_stride_;   // bytes
  uint32_t to_;            // in stage 0
  int stage_stride_;       // bytes
  int bytes_of_block_;     // that a block of 16 rows has of this lane's array in a chunk
  bool copies_;            // this lane has something to copy
};

template <int kBits, int kXTiles>
__device__ __forceinline__ void produce_quantized_x(const QuantizedBlock<kBits, kXTiles>& block) {
  const StreamQuantizedArguments& p = block.p;
  const uint64_t policy = evict_last_policy();
  PipelineState state;
  int free_stages = p.stages;
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step) {
    for (int chunk = block.first_chunk; chunk < block.first_chunk + block.chunks; ++chunk, state.advance(p.stages)) {
      if (--free_stages < 0) mbarrier_wait(block.empty(state.stage), state.parity ^ 1);
      const uint32_t full = block.x_full(state.stage), to = block.x_ring + state.stage * block.stage.x;
      mbarrier_arrive_expect_tx(full, block.stage.x);
      tma_load_2d(to, p.x, full, policy, chunk * kPackedK, 0);
      tma_load_2d(to + block.stage.x / 2, p.x, full, policy, chunk * kPackedK + kXBoxK, 0);
    }
  }
}

// A consumer warp.
template <typename T, int kBits, int kXTiles, int kFoldK>
class QuantizedConsumer {
 public:
  __device__ __forceinline__ explicit QuantizedConsumer(const QuantizedBlock<kBits, kXTiles>& block)
      : block_(block), p(block.p) {
    const int first = p.swiglu ? row_warp_ : kWarpBlocks * row_warp_, step = p.swiglu ? p.tile_blocks : 1;
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) slot_[r] = first + r * step;
    x_offset_ = lane_ % 8 * 128 + ((lane_ / 8 ^ lane_ % 8) << 4);
    for (int r = 0; r < kWarpBlocks; ++r) {
      for (int h = 0; h < 2; ++h) zero_[r][h].set(1U << (kBits - 1));
    }
  }

  // Where the results of this block begin: the first of its chunks has this number among all that the block loads.
  __device__ __forceinline__ void multiply_tile(int tile, int first_chunk_number) {
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int i = 0; i < kXTiles; ++i) sums_[r][i][0] = sums_[r][i][1] = sums_[r][i][2] = sums_[r][i][3] = 0.0F;
    }
    if (p.groups_of_chunk == 0) load_scales_of_rows(tile);
    const int number = first_chunk_number + k_warp_;
    PipelineState state{number % p.stages, number / p.stages % 2};
    for (int chunk = k_warp_; chunk < block_.chunks; chunk += p.k_warps) {
      mbarrier_wait(block_.weight_full(state.stage), state.parity);
      mbarrier_wait(block_.x_full(state.stage), state.parity);
      multiply_chunk(state.stage);
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive(block_.empty(state.stage));
      state.stage += p.k_warps;
      if (state.stage >= p.stages) {
        state.stage -= p.stages;
        state.parity ^= 1;
      }
    }
  }

  // Writes y where this warp has the whole sums.
  __device__ __forceinline__ void write_tile(int tile) const {
#pragma unroll
    for (int i = 0; i < kXTiles; ++i) {
      const float(&sums)[kWarpBlocks][4] = {{sums_[0][i][0], sums_[0][i][1], sums_[0][i][2], sums_[0][i][3]},
                                            {sums_[1][i][0], sums_[1][i][1], sums_[1][i][2], sums_[1][i][3]}};
      write_item(tile, row_warp_, i, sums, bias_);
    }
  }
  __device__ __forceinline__ void load_own_bias(int tile) { load_bias(tile, row_warp_, bias_); }

  // Sends the partial sums to the blocks that own their items. `buffer` is where those receive them.
  __device__ __forceinline__ void send_sums(uint32_t buffer) const {
    int item = row_warp_ * kXTiles;
#pragma unroll
    for (int i = 0; i < kXTiles; ++i, ++item) {
      const uint32_t to = received(buffer, item / p.splits, block_.split * p.k_warps + k_warp_);
      const uint32_t mapped = p.splits == 1 ? to : map_to_block(to, item % p.splits);
#pragma unroll
      for (int r = 0; r < kWarpBlocks; ++r) store_to_block(mapped + r * 512, sums_[r][i]);
    }
  }
  // Loads the bias of the first item that finish_items writes: before the barrier between the two.
  __device__ __forceinline__ void load_first_bias(int tile) {
    if (first_item() < items()) load_bias(tile, first_item() / kXTiles, bias_);
  }
  // Adds the partial sums of the items that the block owns, each by one warp, and writes them.
  __device__ __forceinline__ void finish_items(int tile, uint32_t buffer) {
    const int consumers = p.row_warps * p.k_warps;
#pragma unroll 1
    for (int item = first_item(); item < items(); item += consumers * p.splits) {
      if (item != first_item()) load_bias(tile, item / kXTiles, bias_);
      float sums[kWarpBlocks][4] = {};
      for (int part = 0; part < p.splits * p.k_warps; ++part) {
#pragma unroll
        for (int r = 0; r < kWarpBlocks; ++r) {
          float more[4];
          load_shared(more, received(buffer, item / p.splits, part) + r * 512);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[r][j] += more[j];
        }
      }
      write_item(tile, item / kXTiles, item % kXTiles, sums, bias_);
    }
  }

 private:
  static constexpr int kSteps = kPackedK / 32;  // of 32 k: two mma instructions

  __device__ __forceinline__ float scale_from_bits(uint16_t bits) const {
    return p.bfloat16_scales ? bit_cast<float>(static_cast<uint32_t>(bits) << 16) : to_float(bit_cast<__half>(bits));
  }
  // The scales, and zeros, of one group of all k.
  __device__ __forceinline__ void load_scales_of_rows(int tile) {
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first_row(tile, row_warp_, r) + lane_ / 4 + 8 * h;
        if (row >= p.row_blocks * kPackedRows) continue;
        scale_[r][h] = scale_from_bits(p.scales[row]);
        if (p.zeros != nullptr) zero_[r][h].set(p.zeros[row]);
      }
    }
  }
  __device__ __forceinline__ void load_group(int stage, int group) {
    const int blocks = block_.parts * p.tile_blocks;
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
      const uint32_t block = (group * blocks + slot_[r]) * kPackedRows;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t row = block + lane_ / 4 + 8 * h;
        scale_[r][h] = scale_from_bits(load_shared_16(block_.scales_ring + stage * block_.stage.scales + 2 * row));
        if (p.zeros != nullptr) {
          zero_[r][h].set(load_shared_8(block_.zeros_ring + stage * block_.stage.zeros + row));
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_chunk(int stage) {
    const uint32_t x = block_.x_ring + stage * block_.stage.x + x_offset_;
    const uint32_t codes = block_.codes_ring + stage * block_.stage.codes + 16 * lane_;
    uint32_t words[kWarpBlocks][4];
    float group_sums[kWarpBlocks][kXTiles][4];
    const int steps_of_group = p.groups_of_chunk == 0 ? kSteps : kSteps / p.groups_of_chunk;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // With a group of all k the scales stay.
      if (kFoldK == kPackedK ? step == 0 && p.groups_of_chunk != 0
                             : p.groups_of_chunk != 0 && step % steps_of_group == 0) {
        load_group(stage, step / steps_of_group);
      }
      // A word of int4 has two k-steps of a row, one of int8 one.
      constexpr int kWords = kBits == 4 ? 1 : 2;  // of a row
#pragma unroll
      for (int r = 0; r < kWarpBlocks; ++r) {
        if (kBits == 8 || step % 2 == 0) {
          const int block = kBits == 4 ? step / 2 : step;
          load_shared_words(words[r], codes + slot_[r] * (kPackedRows * kPackedK * kBits / 8) + block * kPackedBlockBytes);
        }
      }
      uint32_t a[kWarpBlocks][2][4];  // of two k-steps
#pragma unroll
      for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            uint32_t pairs[16 / kBits];
            to_pairs<T, kBits>(words[r][2 * h + (kBits == 4 ? step % 2 : w)], zero_[r][h], pairs);
#pragma unroll
            for (int i = 0; i < 16 / kBits; i += 2) {
              a[r][w + i / 2][h] = pairs[i];
              a[r][w + i / 2][2 + h] = pairs[i + 1];
            }
          }
        }
      }
      constexpr int kFoldSteps = kFoldK / 32;
#pragma unroll
      for (int i = 0; i < kXTiles; ++i) {
        uint32_t b[4];
        ldmatrix_x4(b, (x + step / 2 * (block_.stage.x / 2) + i * 1024) ^ (step % 2 * 64));
#pragma unroll
        for (int r = 0; r < kWarpBlocks; ++r) {
          float(&z)[4] = group_sums[r][i];
          if (step % kFoldSteps == 0) z[0] = z[1] = z[2] = z[3] = 0.0F;
          mma_m16n8k16<T>(z, a[r][0], b[0], b[1]);
          mma_m16n8k16<T>(z, a[r][1], b[2], b[3]);
          if (step % kFoldSteps == kFoldSteps - 1) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums_[r][i][j] = fmaf(scale_[r][j / 2], z[j], sums_[r][i][j]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ int items() const { return p.row_warps * kXTiles; }
  __device__ __forceinline__ int first_item() const { return block_.split + warp_ * p.splits; }
  // Where a block receives part `part` of the sums of the `index`-th item that it owns.
  __device__ __forceinline__ uint32_t received(uint32_t buffer, int index, int part) const {
    return buffer + (index * p.splits * p.k_warps + part) * kItemBytes + lane_ * 16;
  }

  // The first row of a warp's block, of the gate with SwiGLU where r is 0 and of up where it is 1.
  __device__ __forceinline__ int first_row(int tile, int row_warp, int r) const {
    const int block = tile * p.tile_blocks + (p.swiglu ? row_warp + r * p.up_blocks : kWarpBlocks * row_warp + r);
    return block * kPackedRows;
  }
  // The columns of y of a warp's block; the end of those of the tile, and of y.
  __device__ __forceinline__ int first_column(int tile, int row_warp, int r) const {
    return (tile * p.tile_blocks + (p.swiglu ? row_warp : kWarpBlocks * row_warp + r)) * kPackedRows;
  }
  __device__ __forceinline__ int end_column(int tile) const {
    return min(p.columns, (tile + 1) * p.tile_blocks * kPackedRows);
  }
  __device__ __forceinline__ void load_bias(int tile, int row_warp, float (&bias)[kWarpBlocks][2]) const {
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int column = first_column(tile, row_warp, p.swiglu ? 0 : r) + lane_ / 4 + 8 * h;
        const bool exists = p.bias != nullptr && column < p.columns;
        bias[r][h] =
            exists ? to_float(static_cast<const T*>(p.bias)[column + (p.swiglu && r == 1 ? p.columns : 0)]) : 0.0F;
      }
    }
  }
  __device__ __forceinline__ void write_item(int tile, int row_warp, int x_tile, const float (&sums)[kWarpBlocks][4],
                                             const float (&bias)[kWarpBlocks][2]) const {
    if (p.swiglu) {
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = silu<T>(sums[0][j] + bias[0][j / 2]) * (sums[1][j] + bias[1][j / 2]);
      write_block(first_column(tile, row_warp, 0), end_column(tile), x_tile, y);
      return;
    }
#pragma unroll
    for (int r = 0; r < kWarpBlocks; ++r) {
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = sums[r][j] + bias[r][j / 2];
      write_block(first_column(tile, row_warp, r), end_column(tile), x_tile, y);
    }
  }
  // Writes 8 rows times 16 columns of y. A lane has two rows of two columns, and gets two columns of two rows.
  __device__ __forceinline__ void write_block(int first_column, int end_column, int x_tile, const float (&y)[4]) const {
    const uint32_t pairs[2] = {movmatrix_trans(pack_pair<T>(y[0], y[1])), movmatrix_trans(pack_pair<T>(y[2], y[3]))};
    const int row = 8 * x_tile + lane_ / 4;
    if (row < p.rows) {
#pragma unroll
      for (int h = 0; h < 2; ++h) write_pair(row, first_column + 8 * h + 2 * (lane_ % 4), end_column, pairs[h]);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void write_pair(int row, int column, int end_column, uint32_t pair) const {
    uint16_t* const to = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(row) * p.columns + column;
    if (p.writes_pairs) {  // then there is an even number of columns
      if (column < end_column) *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
      if (column < end_column) to[0] = static_cast<uint16_t>(pair);
      if (column + 1 < end_column) to[1] = static_cast<uint16_t>(pair >> 16);
    }
  }

  const QuantizedBlock<kBits, kXTiles>& block_;
  const StreamQuantizedArguments& p;
  const int warp_ = static_cast<int>(threadIdx.x) / 32;
  const int lane_ = static_cast<int>(threadIdx.x) % 32;
  const int row_warp_ = warp_ % p.row_warps;
  const int k_warp_ = warp_ / p.row_warps;
  int slot_[kWarpBlocks];  // of this warp's blocks in a stage
  uint32_t x_offset_;      // of a lane's row and pack in the first matrix of x
  ZeroPoint<T, kBits> zero_[kWarpBlocks][2];
  float scale_[kWarpBlocks][2];
  float bias_[kWarpBlocks][2];
  float sums_[kWarpBlocks][kXTiles][4];
};

template <typename T, int kBits, int kXTiles, int kFoldK>
__global__ void __launch_bounds__(32 * (quantized_max_consumers(kXTiles) + kQuantizedProducerWarps),
                                  quantized_blocks_per_multiprocessor(kXTiles))
    gemm_quantized(const __grid_constant__ StreamQuantizedArguments p) {
  trigger_dependent_launch();
  extern __shared__ char shared[];
  const QuantizedBlock<kBits, kXTiles> block(p, shared_address(shared));
  const int consumers = p.row_warps * p.k_warps;
  const int warp = static_cast<int>(threadIdx.x) / 32 - consumers;  // 0 and more: producers
  if (warp == 0) {
    block.init_barriers();
  } else if (warp == 1 && threadIdx.x % 32 == 0) {
    prefetch_tensor_map(p.x);
  }
  __syncthreads();
  if (p.splits > 1) cluster_arrive();
  if (warp == 0) {
    if (!p.constant_weight) wait_for_previous_kernel();
    QuantizedProducer<kBits, kXTiles>(block).load_all();
  } else if (warp == 1 && threadIdx.x % 32 == 0) {
    wait_for_previous_kernel();
    produce_quantized_x(block);
  }
  __syncwarp();
  if (p.splits > 1) cluster_wait();  // the other blocks have started: their shared memory can be written
  if (warp >= 0) {
    if (p.splits > 1) {
      cluster_arrive();
      cluster_wait();
    }
    return;
  }
  if (!p.constant_weight) wait_for_previous_kernel();
  QuantizedConsumer<T, kBits, kXTiles, kFoldK> consumer(block);
  const bool exchanges = p.splits * p.k_warps > 1;
  const int received_bytes = divide_up(p.row_warps * kXTiles, p.splits) * p.splits * p.k_warps * kItemBytes;
  int chunk_number = 0, parity = 0;
  for (int tile = block.first_tile; tile < p.tiles; tile += block.tile_step) {
    if (!exchanges) consumer.load_own_bias(tile);
    consumer.multiply_tile(tile, chunk_number);
    chunk_number += block.chunks;
    if (!exchanges) {
      if (p.constant_weight) wait_for_previous_kernel();
      consumer.write_tile(tile);
      continue;
    }
    // The next tile's sums go to the other buffer: one barrier is enough.
    const uint32_t buffer = block.received + parity * received_bytes;
    parity ^= 1;
    consumer.send_sums(buffer);
    consumer.load_first_bias(tile);
    if (p.splits > 1) {  // then the block has one tile
      cluster_arrive();
      cluster_wait();
    } else {
      asm volatile("barrier.sync 1, %0;" ::"r"(32 * consumers) : "memory");
    }
    if (p.constant_weight) wait_for_previous_kernel();
    consumer.finish_items(tile, buffer);
  }
}

}  // namespace qwen_plugins
