// The streaming GEMM of 8-bit x and 8-bit weights (stream_hopper.cuh): two codes are loaded as one 16-bit element, and
// wgmma multiplies codes as they are.
//
// int8 is summed exactly in int32. Of e4m3 wgmma keeps fewer bits of a sum than float32 has, so the products of each
// chunk, 128 k, are summed alone, and added in float32: times the scale of the weight's block, where it has blocks of
// 128 x 128. The other scales are applied at the end.
#pragma once

#include "kernels/common/quotient.cuh"
#include "kernels/common/wgmma_eight_bit.cuh"
#include "stream_hopper.cuh"

namespace qwen_plugins {

struct StreamEightBitArguments : StreamHopperArguments {
  const float* x_scales;
  const float* weight_scales;
  const float* y_scale;  // null: y is of 16 bits
  bool x_scale_per_row;
  bool block_scales;  // weight_scales are of blocks of 128 x 128, else of rows
  bool bfloat16;      // bias, and y of 16 bits
};

// Up to so many rows of x the sums of one chunk are added while the next is multiplied: for more there are too few
// registers.
constexpr int kMaxOverlappedRows = 64;
// The consumer warpgroups that a block may have.
template <typename Sum>
constexpr int max_warpgroups_of_codes(int x_rows) {
  if (std::is_same_v<Sum, int32_t>) return max_warpgroups_of(x_rows);
  return x_rows <= 32 ? 4 : x_rows <= kMaxOverlappedRows ? 3 : 2;
}

// A consumer warpgroup, of int8 where Sum is int32_t, and of e4m3 where it is float.
template <typename Sum, int kRows>
class StreamEightBitConsumer : public StreamConsumer<StreamEightBitConsumer<Sum, kRows>, Sum, kRows> {
  using Base = StreamConsumer<StreamEightBitConsumer<Sum, kRows>, Sum, kRows>;
  using Base::block_, Base::lane_, Base::p, Base::sums_, Base::warp_, Base::weight_state_, Base::x_state_;
  using Base::kTiles;

 public:
  __device__ __forceinline__ StreamEightBitConsumer(const StreamBlock<kRows>& block,
                                                    const StreamEightBitArguments& arguments)
      : Base(block, arguments, uniform(static_cast<int>(threadIdx.x) / kWarpgroupThreads)), arguments_(arguments) {}

  __device__ __forceinline__ void multiply_tile(int tile) {
    load_scales(tile);
    this->clear_sums();
    if constexpr (kIsInt8) {
      this->multiply_chunks();
    } else {
      add_chunks();
    }
  }
  static __device__ __forceinline__ void multiply_chunk(Sum (&sums)[kTiles][4], uint32_t weights, uint32_t x,
                                                        bool accumulate) {
    // With a single warp on each of an SM's schedulers the instructions between wgmmas take their time: the descriptors
    // of the next 32 bytes of k are made by one addition.
    const uint64_t a = matrix_descriptor(weights, 16), b = matrix_descriptor(x, 16);
#pragma unroll
    for (int k = 0; k < kSwizzleBytes; k += 32) {
      wgmma_of_codes(sums, moved_descriptor(a, k), moved_descriptor(b, k), accumulate || k > 0);
    }
  }
  __device__ __forceinline__ void write_tile(int tile, bool last) {
    apply_scales();
    if (arguments_.y_scale != nullptr) {
      this->put_results([&](int i, int half) { return codes(results(i, half)); });
    } else {
      this->put_results([&](int i, int half) { return halves(results(i, half)); });
    }
    this->write_rows(tile, last);
  }
  __device__ __forceinline__ void write_pack(int row, int column, int end_column, uint32_t from) const {
    if (arguments_.y_scale == nullptr) {
      Base::write_pack(row, column, end_column, from);
      return;
    }
    uint8_t* const to = static_cast<uint8_t*>(p.y) + static_cast<int64_t>(row) * p.columns + column;
    if (p.writes_packs) {
      float words[4];
      load_shared(words, from);
      *reinterpret_cast<uint2*>(to) = make_uint2(lower_bytes(words[0], words[1]), lower_bytes(words[2], words[3]));
      return;
    }
#pragma unroll 1
    for (int i = 0; i < 8 && column + i < end_column; ++i) to[i] = static_cast<uint8_t>(load_shared_8(from + 2 * i));
  }

 private:
  // The same value, of which the compiler knows that it is the same in all lanes.
  static __device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0U, value, 0); }

  static constexpr bool kIsInt8 = std::is_same_v<Sum, int32_t>;
  static constexpr bool kOverlaps = kRows <= kMaxOverlappedRows;
  using ChunkSums = Sum[kTiles][4];

  // --- e4m3: sums of chunks.

  __device__ __forceinline__ void add_chunks() {
    ChunkSums sums;
    int chunk = block_.first_chunk;
    this->start_chunk(sums, false);
    if constexpr (kOverlaps) {
      ChunkSums other_sums;
      for (; chunk + 2 < block_.end_chunk; chunk += 2) {
        add_and_start(sums, other_sums, chunk);
        add_and_start(other_sums, sums, chunk + 1);
      }
      if (chunk + 1 < block_.end_chunk) {
        add_and_start(sums, other_sums, chunk);
        add_last(other_sums, chunk + 1);
      } else {
        add_last(sums, chunk);
      }
    } else {
      for (; chunk + 1 < block_.end_chunk; ++chunk) {
        add_last(sums, chunk);
        this->start_chunk(sums, false);
      }
      add_last(sums, chunk);
    }
  }
  // Starts the next chunk, and adds the sums of one meanwhile.
  __device__ __forceinline__ void add_and_start(ChunkSums& sums, ChunkSums& next_sums, int chunk) {
    const int weight_stage = weight_state_.stage, x_stage = x_state_.stage;
    this->advance();
    this->start_chunk(next_sums, false);
    wgmma_wait_group<1>();
    this->release(weight_stage, x_stage);
    add(sums, chunk);
  }
  // Adds the sums of the only chunk that has been started.
  __device__ __forceinline__ void add_last(ChunkSums& sums, int chunk) {
    wgmma_wait_group<0>();
    this->release(weight_state_.stage, x_state_.stage);
    this->advance();
    add(sums, chunk);
  }
  __device__ __forceinline__ void add(const ChunkSums& sums, int chunk) {
    float scales[2] = {1.0F, 1.0F};
    if (arguments_.block_scales) {
      const int lane = (chunk - block_.first_chunk) % 32;
      if (lane == 0) load_block_scales(chunk + 32);
#pragma unroll
      for (int h = 0; h < 2; ++h) scales[h] = __shfl_sync(~0U, block_scales_[h], lane);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums_[i][j] = fmaf(scales[j / 2], sums[i][j], sums_[i][j]);
    }
  }
  // The scales of 32 chunks, one in each lane, which are loaded while the 32 before them are multiplied.
  __device__ __forceinline__ void load_block_scales(int first_chunk) {
    const int chunk = first_chunk + lane_;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      block_scales_[h] = next_block_scales_[h];
      if (chunk < block_.end_chunk) next_block_scales_[h] = arguments_.weight_scales[first_of_block_row_[h] + chunk];
    }
  }

  // --- Scales and bias of a tile.

  __device__ __forceinline__ void load_scales(int tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = this->first_column(tile, warp_) + lane_ / 4 + (p.swiglu ? 0 : 8 * h);
      const int row = column + (p.swiglu ? h * p.columns : 0);
      const bool exists = column < p.columns;
      bias_[h] = exists && p.bias != nullptr ? load_bias(row) : 0.0F;
      weight_scales_[h] = 1.0F;
      if (arguments_.block_scales) {
        // That of the warp's first row, which exists if any of these does: each lane loads scales for all of the warp.
        const int first_row = row - lane_ / 4;
        first_of_block_row_[h] = column - lane_ / 4 < p.columns ? first_row / 128 * p.chunks : 0;
      } else if (exists) {
        weight_scales_[h] = arguments_.weight_scales[row];
      }
    }
    if (arguments_.block_scales) load_block_scales(block_.first_chunk);
#pragma unroll
    for (int i = 0; i < kScaleTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = block_.x_row(tile) + 64 * i + 2 * lane_ + r;
        x_scales_[i][r] = row < p.rows ? arguments_.x_scales[arguments_.x_scale_per_row ? row : 0] : 0.0F;
      }
    }
    if (arguments_.y_scale != nullptr) y_factor_ = finite_reciprocal(*arguments_.y_scale);
  }
  __device__ __forceinline__ float load_bias(int row) const {
    return arguments_.bfloat16 ? to_float(static_cast<const __nv_bfloat16*>(p.bias)[row])
                               : to_float(static_cast<const __half*>(p.bias)[row]);
  }

  // Makes z of the owned sums, as float32.
  __device__ __forceinline__ void apply_scales() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (!this->owns(i)) continue;
      const int lane = i % 8 * 4 + lane_ % 4;  // it has the scales of the two rows
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x_scale = __shfl_sync(~0U, x_scales_[i / 8][r], lane);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float sum = static_cast<float>(sums_[i][2 * h + r]);
          sums_[i][2 * h + r] = bit_cast<Sum>(fmaf(sum * weight_scales_[h], x_scale, bias_[h]));
        }
      }
    }
  }
  __device__ __forceinline__ float2 results(int i, int half) const {
    const auto z = [&](int j) { return bit_cast<float>(sums_[i][j]); };
    if (p.swiglu) return {silu<__half>(z(0)) * z(2), silu<__half>(z(1)) * z(3)};
    return {z(2 * half), z(2 * half + 1)};
  }
  __device__ __forceinline__ uint32_t halves(float2 y) const {
    const uint32_t bfloat16 = pack_pair<__nv_bfloat16>(y.x, y.y), float16 = pack_pair<__half>(y.x, y.y);
    return arguments_.bfloat16 ? bfloat16 : float16;
  }
  __device__ __forceinline__ uint32_t codes(float2 y) const {
    const float low = y.x * y_factor_, high = y.y * y_factor_;
    if constexpr (kIsInt8) return __byte_perm(to_int8_bits(low), to_int8_bits(high), 0x0400);
    return to_float8_e4m3_bits(low) | to_float8_e4m3_bits(high) << 16;
  }
  // The lower bytes of four 16-bit elements.
  static __device__ __forceinline__ uint32_t lower_bytes(float low, float high) {
    return __byte_perm(bit_cast<uint32_t>(low), bit_cast<uint32_t>(high), 0x6420);
  }

  static constexpr int kScaleTiles = divide_up(kRows, 64);

  const StreamEightBitArguments& arguments_;
  // Of the two weight rows of this thread.
  float bias_[2], weight_scales_[2];
  float block_scales_[2], next_block_scales_[2];
  int first_of_block_row_[2];
  float x_scales_[kScaleTiles][2];  // of rows 2 lane and 2 lane + 1 of 64 rows of x
  float y_factor_;
};

template <typename Sum, int kRows>
__global__ void __launch_bounds__(kWarpgroupThreads* max_warpgroups_of_codes<Sum>(kRows) + 32 * kProducerWarps, 1)
    gemm_eight_bit(const __grid_constant__ StreamEightBitArguments p) {
  stream_gemm<StreamEightBitConsumer<Sum, kRows>, kRows>(p);
}

}  // namespace qwen_plugins
