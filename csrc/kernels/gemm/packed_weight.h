// The packed layout of quantized weights, number 2: one for all GPUs and kernels. Packing is a function of the host.
//
// Rows are padded to a multiple of 64 and inputs (k) to a multiple of 128, with weights of zero. Codes are stored in
// blocks of 512 bytes, which are operand a of mma.m16n8k16 (or a warp's part of operand a of wgmma in registers): 16
// rows times 64 k (int4) or 32 k (int8). Lane l = 4 g + t of a warp loads the 16 bytes 16 l of a block:
//
//   block    16 rows x 64 k of int4, or 32 k of int8          bits of a word of int4, by their k in two k-steps of 16
//            lane 0   lane 1   ...   lane 31                   31-28  27-24  23-20  19-16  15-12  11-8   7-4    3-0
//            16 bytes 16 bytes       16 bytes                  2t+25  2t+17  2t+9   2t+1   2t+24  2t+16  2t+8   2t
//
//   lane     word 0, word 1: row g                            bytes of a word of int8, by their k in one k-step of 16
//            word 2, word 3: row g + 8                        31-24  23-16  15-8   7-0
//            word 0 or 2 is the first half of the block's k   2t+9   2t+1   2t+8   2t
//
// So `(w >> 4 i) & 0x000f000f` are the two neighbours that a register of an operand holds (int8: bytes 0 and 2, then 1
// and 3). The arrays, the last dimension contiguous:
//
//   codes    [k / 128][rows / 16][2 (int4) or 4 (int8) blocks, by k][512 bytes]
//   scales   [groups][rows]   16-bit floating point; groups are those of the padded k, or one
//   zeros    [groups][rows]   uint8, only in formats with zero points
//
// With SwiGLU the first half of the rows is the gate, as in weights that are not quantized.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm.h"
#include "kernels/common/api.h"
#include "kernels/common/arithmetic.h"

namespace qwen_plugins {

constexpr int kPackedRowUnit = 64;  // rows are padded to a multiple of this
constexpr int kPackedK = 128;       // k are padded to a multiple of this
constexpr int kPackedRows = 16;     // of a block
constexpr int kPackedBlockBytes = 512;

__host__ __device__ constexpr int bits_of(WeightKind kind) { return kind == WeightKind::kInt4 ? 4 : 8; }
// The zero point of formats without zero points.
__host__ __device__ constexpr int middle_code_of(WeightKind kind) { return 1 << (bits_of(kind) - 1); }
// The bytes of 16 rows times 128 k.
__host__ __device__ constexpr int superblock_bytes_of(WeightKind kind) {
  return kPackedRows * kPackedK * bits_of(kind) / 8;
}

// The sizes of a packed weight of `rows` rows and `k` inputs.
struct PackedSizes {
  int64_t rows;         // padded
  int64_t k;            // padded
  int64_t groups;       // of the padded k
  int64_t code_bytes;   // of all codes
  int64_t scale_count;  // of scales, and of zeros where there are any

  __host__ __device__ PackedSizes(const WeightFormat& format, int64_t of_rows, int64_t of_k)
      : rows(divide_up(of_rows, kPackedRowUnit) * kPackedRowUnit),
        k(divide_up(of_k, kPackedK) * kPackedK),
        groups(format.group_size == 0 ? 1 : k / format.group_size),
        code_bytes(rows * k * bits_of(format.kind) / 8),
        scale_count(groups * rows) {}
};

// A quantized weight as readers of checkpoints give it: natural order, contiguous.
struct UnpackedWeight {
  uint8_t* codes;    // [rows, k]: 0 to 15, or 0 to 255
  uint16_t* scales;  // [rows, groups]: 16-bit floating point, whichever
  uint8_t* zeros;    // [rows, groups]; null: none
};
struct PackedWeight {
  uint8_t* codes;
  uint16_t* scales;
  uint8_t* zeros;
};

// Write the packed form of a weight, and the reverse, with up to `threads` threads of the host. The format is valid for
// k inputs, and has zero points where zeros are not null. The codes of int4 are at most 15.
QWEN_PLUGINS_API void pack_weight(const WeightFormat& format, int64_t rows, int64_t k, const UnpackedWeight& from,
                                  const PackedWeight& to, int threads);
QWEN_PLUGINS_API void unpack_weight(const WeightFormat& format, int64_t rows, int64_t k, const PackedWeight& from,
                                    const UnpackedWeight& to, int threads);

}  // namespace qwen_plugins
