// wgmma, the matrix multiply of a warpgroup (sm_90a): how its operands lie in shared memory, and the instructions.
#pragma once

#include "elements.cuh"

namespace qwen_plugins {

constexpr int kWarpgroupThreads = 128;

// A tile in shared memory is column panels of 64 16-bit elements, one panel after the other: rows of 128 bytes whose
// eight 16-byte chunks are permuted by the row (the 128-byte swizzle). A panel begins at a multiple of 1024 bytes.
constexpr int kSwizzleColumns = 64;
constexpr int kSwizzleBytes = 128;

// The byte offset of chunk `chunk` (8 columns) of a row, in a tile of `rows` rows.
__device__ __forceinline__ int swizzled_offset(int rows, int row, int chunk) {
  return (chunk / 8 * rows + row) * kSwizzleBytes + (chunk % 8 ^ row % 8) * 16;
}

// The matrix descriptor of an operand in shared memory. `panel_bytes` is the distance of its panels (the leading
// dimension byte offset), which is only used for an MN-major operand, whose rows are the k dimension.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared_address, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStrideOfEightRows = uint64_t{8 * kSwizzleBytes / 16} << 32;
  return kSwizzle128 | kStrideOfEightRows | static_cast<uint64_t>(panel_bytes / 16) << 16 |
         (shared_address & 0x3ffff) >> 4;
}

// The descriptor of an operand that begins `bytes` bytes, a multiple of 16, behind the one of `descriptor`.
__device__ __forceinline__ uint64_t moved_descriptor(uint64_t descriptor, uint32_t bytes) {
  const auto low = static_cast<uint32_t>(descriptor) + bytes / 16;  // no carry: 14 bits have all of shared memory
  return (descriptor & 0xffffffff00000000) | low;
}

// Must precede the first wgmma, and every wgmma that uses registers which other instructions wrote.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` of the latest groups are incomplete.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// A barrier of one warpgroup: `barrier` is the number of a named barrier, of which 0 is that of __syncthreads.
__device__ __forceinline__ void warpgroup_sync(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

// clang-format off
#define QWEN_TILE(c, i) "+f"((c)[i][0]), "+f"((c)[i][1]), "+f"((c)[i][2]), "+f"((c)[i][3])
#define QWEN_TILES_2(c) QWEN_TILE(c, 0), QWEN_TILE(c, 1)
#define QWEN_TILES_3(c) QWEN_TILES_2(c), QWEN_TILE(c, 2)
#define QWEN_TILES_4(c) QWEN_TILES_3(c), QWEN_TILE(c, 3)
#define QWEN_TILES_6(c) QWEN_TILES_4(c), QWEN_TILE(c, 4), QWEN_TILE(c, 5)
#define QWEN_TILES_8(c) QWEN_TILES_6(c), QWEN_TILE(c, 6), QWEN_TILE(c, 7)
#define QWEN_TILES_12(c) QWEN_TILES_8(c), QWEN_TILE(c, 8), QWEN_TILE(c, 9), QWEN_TILE(c, 10), QWEN_TILE(c, 11)
#define QWEN_TILES_16(c) QWEN_TILES_12(c), QWEN_TILE(c, 12), QWEN_TILE(c, 13), QWEN_TILE(c, 14), QWEN_TILE(c, 15)
#define QWEN_TILES_24(c) QWEN_TILES_16(c), QWEN_TILE(c, 16), QWEN_TILE(c, 17), QWEN_TILE(c, 18), QWEN_TILE(c, 19), \
    QWEN_TILE(c, 20), QWEN_TILE(c, 21), QWEN_TILE(c, 22), QWEN_TILE(c, 23)
#define QWEN_TILES_28(c) QWEN_TILES_24(c), QWEN_TILE(c, 24), QWEN_TILE(c, 25), QWEN_TILE(c, 26), QWEN_TILE(c, 27)
#define QWEN_TILES_32(c) QWEN_TILES_28(c), QWEN_TILE(c, 28), QWEN_TILE(c, 29), QWEN_TILE(c, 30), QWEN_TILE(c, 31)
#define QWEN_REGISTERS_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QWEN_REGISTERS_3 QWEN_REGISTERS_2 ", %8, %9, %10, %11"
#define QWEN_REGISTERS_4 QWEN_REGISTERS_3 ", %12, %13, %14, %15"
#define QWEN_REGISTERS_6 QWEN_REGISTERS_4 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define QWEN_REGISTERS_8 QWEN_REGISTERS_6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define QWEN_REGISTERS_12 QWEN_REGISTERS_8 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define QWEN_REGISTERS_16 QWEN_REGISTERS_12 \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QWEN_REGISTERS_24 QWEN_REGISTERS_16 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QWEN_REGISTERS_28 QWEN_REGISTERS_24 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define QWEN_REGISTERS_32 QWEN_REGISTERS_28 \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// c += a · b^T, both operands in shared memory, k along their columns.
#define QWEN_WGMMA(type, n, tiles, registers, operand_a, operand_b, c, a, b) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, " operand_a ", " operand_b \
               ", 1, 1, 1, 0, 0;" : tiles(c) : "l"(a), "l"(b))
#define QWEN_WGMMA_2(type, c, a, b) QWEN_WGMMA(type, "16", QWEN_TILES_2, QWEN_REGISTERS_2, "%8", "%9", c, a, b)
#define QWEN_WGMMA_3(type, c, a, b) QWEN_WGMMA(type, "24", QWEN_TILES_3, QWEN_REGISTERS_3, "%12", "%13", c, a, b)
#define QWEN_WGMMA_4(type, c, a, b) QWEN_WGMMA(type, "32", QWEN_TILES_4, QWEN_REGISTERS_4, "%16", "%17", c, a, b)
#define QWEN_WGMMA_6(type, c, a, b) QWEN_WGMMA(type, "48", QWEN_TILES_6, QWEN_REGISTERS_6, "%24", "%25", c, a, b)
#define QWEN_WGMMA_8(type, c, a, b) QWEN_WGMMA(type, "64", QWEN_TILES_8, QWEN_REGISTERS_8, "%32", "%33", c, a, b)
#define QWEN_WGMMA_12(type, c, a, b) \
  QWEN_WGMMA(type, "96", QWEN_TILES_12, QWEN_REGISTERS_12, "%48", "%49", c, a, b)
#define QWEN_WGMMA_16(type, c, a, b) \
  QWEN_WGMMA(type, "128", QWEN_TILES_16, QWEN_REGISTERS_16, "%64", "%65", c, a, b)
#define QWEN_WGMMA_24(type, c, a, b) \
  QWEN_WGMMA(type, "192", QWEN_TILES_24, QWEN_REGISTERS_24, "%96", "%97", c, a, b)
#define QWEN_WGMMA_28(type, c, a, b) \
  QWEN_WGMMA(type, "224", QWEN_TILES_28, QWEN_REGISTERS_28, "%112", "%113", c, a, b)
#define QWEN_WGMMA_32(type, c, a, b) \
  QWEN_WGMMA(type, "256", QWEN_TILES_32, QWEN_REGISTERS_32, "%128", "%129", c, a, b)
// Likewise; c = a · b^T if not `accumulate`.
#define QWEN_WGMMA_ACCUMULATE(type, c, a, b, accumulate) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" QWEN_REGISTERS_8 "}, %32, %33, p, 1, 1, 0, 0;\n}" \
               : QWEN_TILES_8(c) : "l"(a), "l"(b), "r"(accumulate))
// c += a · b with a in registers, or c = a · b where `accumulate` is "0"; k along the rows of b where `trans` is "1", along
// its columns (b^T) where it is "0".
#define QWEN_WGMMA_A_IN_REGISTERS(accumulate, trans, type, n, tiles, registers, a0, a1, a2, a3, operand_b, c, a, b) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" registers "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " \
               operand_b ", " accumulate ", 1, 1, " trans ";" \
               : tiles(c) : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b))
#define QWEN_WGMMA_A_IN_REGISTERS_4(accumulate, trans, type, c, a, b) \
  QWEN_WGMMA_A_IN_REGISTERS(accumulate, trans, type, "32", QWEN_TILES_4, QWEN_REGISTERS_4, "%16", "%17", "%18", "%19", "%20", c, a, b)
#define QWEN_WGMMA_A_IN_REGISTERS_8(accumulate, trans, type, c, a, b) \
  QWEN_WGMMA_A_IN_REGISTERS(accumulate, trans, type, "64", QWEN_TILES_8, QWEN_REGISTERS_8, "%32", "%33", "%34", "%35", "%36", c, a, b)
#define QWEN_WGMMA_A_IN_REGISTERS_16(accumulate, trans, type, c, a, b) \
  QWEN_WGMMA_A_IN_REGISTERS(accumulate, trans, type, "128", QWEN_TILES_16, QWEN_REGISTERS_16, "%64", "%65", "%66", "%67", "%68", c, a, b)
#define QWEN_WGMMA_A_IN_REGISTERS_24(accumulate, trans, type, c, a, b) \
  QWEN_WGMMA_A_IN_REGISTERS(accumulate, trans, type, "192", QWEN_TILES_24, QWEN_REGISTERS_24, "%96", "%97", "%98", "%99", "%100", c, a, b)
#define QWEN_WGMMA_A_IN_REGISTERS_32(accumulate, trans, type, c, a, b) \
  QWEN_WGMMA_A_IN_REGISTERS(accumulate, trans, type, "256", QWEN_TILES_32, QWEN_REGISTERS_32, "%128", "%129", "%130", "%131", "%132", c, a, b)
// clang-format on

// c [64 x 8 kTiles] += a [64 x 16] · b [8 kTiles x 16]^T, both given by matrix descriptors. Each warp has 16 rows of c,
// in tiles of 8 columns with the layout of mma_m16n8k16.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  static_assert(kTiles == 2 || kTiles == 3 || kTiles == 4 || kTiles == 6 || kTiles == 8 || kTiles == 12 ||
                kTiles == 16 || kTiles == 24 || kTiles == 28 || kTiles == 32);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 2) QWEN_WGMMA_2("f16", c, a, b);
    if constexpr (kTiles == 3) QWEN_WGMMA_3("f16", c, a, b);
    if constexpr (kTiles == 4) QWEN_WGMMA_4("f16", c, a, b);
    if constexpr (kTiles == 6) QWEN_WGMMA_6("f16", c, a, b);
    if constexpr (kTiles == 8) QWEN_WGMMA_8("f16", c, a, b);
    if constexpr (kTiles == 12) QWEN_WGMMA_12("f16", c, a, b);
    if constexpr (kTiles == 16) QWEN_WGMMA_16("f16", c, a, b);
    if constexpr (kTiles == 24) QWEN_WGMMA_24("f16", c, a, b);
    if constexpr (kTiles == 28) QWEN_WGMMA_28("f16", c, a, b);
    if constexpr (kTiles == 32) QWEN_WGMMA_32("f16", c, a, b);
  } else {
    if constexpr (kTiles == 2) QWEN_WGMMA_2("bf16", c, a, b);
    if constexpr (kTiles == 3) QWEN_WGMMA_3("bf16", c, a, b);
    if constexpr (kTiles == 4) QWEN_WGMMA_4("bf16", c, a, b);
    if constexpr (kTiles == 6) QWEN_WGMMA_6("bf16", c, a, b);
    if constexpr (kTiles == 8) QWEN_WGMMA_8("bf16", c, a, b);
    if constexpr (kTiles == 12) QWEN_WGMMA_12("bf16", c, a, b);
    if constexpr (kTiles == 16) QWEN_WGMMA_16("bf16", c, a, b);
    if constexpr (kTiles == 24) QWEN_WGMMA_24("bf16", c, a, b);
    if constexpr (kTiles == 28) QWEN_WGMMA_28("bf16", c, a, b);
    if constexpr (kTiles == 32) QWEN_WGMMA_32("bf16", c, a, b);
  }
}

// Likewise with 64 rows of b; c = a · b^T if not `accumulate`.
template <typename T>
__device__ __forceinline__ void wgmma(float (&c)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    QWEN_WGMMA_ACCUMULATE("f16", c, a, b, static_cast<int>(accumulate));
  } else {
    QWEN_WGMMA_ACCUMULATE("bf16", c, a, b, static_cast<int>(accumulate));
  }
}

// c [64 x 8 kTiles] += a [64 x 16] · b [16 x 8 kTiles], a in registers with the layout of mma_m16n8k16.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 8) QWEN_WGMMA_A_IN_REGISTERS_8("1", "1", "f16", c, a, b);
    if constexpr (kTiles == 16) QWEN_WGMMA_A_IN_REGISTERS_16("1", "1", "f16", c, a, b);
  } else {
    if constexpr (kTiles == 8) QWEN_WGMMA_A_IN_REGISTERS_8("1", "1", "bf16", c, a, b);
    if constexpr (kTiles == 16) QWEN_WGMMA_A_IN_REGISTERS_16("1", "1", "bf16", c, a, b);
  }
}

// c [64 x 8 kTiles] += a [64 x 16] · b [8 kTiles x 16]^T, a in registers with the layout of mma_m16n8k16.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_transposed(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 24 || kTiles == 32);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 4) QWEN_WGMMA_A_IN_REGISTERS_4("1", "0", "f16", c, a, b);
    if constexpr (kTiles == 8) QWEN_WGMMA_A_IN_REGISTERS_8("1", "0", "f16", c, a, b);
    if constexpr (kTiles == 16) QWEN_WGMMA_A_IN_REGISTERS_16("1", "0", "f16", c, a, b);
    if constexpr (kTiles == 24) QWEN_WGMMA_A_IN_REGISTERS_24("1", "0", "f16", c, a, b);
    if constexpr (kTiles == 32) QWEN_WGMMA_A_IN_REGISTERS_32("1", "0", "f16", c, a, b);
  } else {
    if constexpr (kTiles == 4) QWEN_WGMMA_A_IN_REGISTERS_4("1", "0", "bf16", c, a, b);
    if constexpr (kTiles == 8) QWEN_WGMMA_A_IN_REGISTERS_8("1", "0", "bf16", c, a, b);
    if constexpr (kTiles == 16) QWEN_WGMMA_A_IN_REGISTERS_16("1", "0", "bf16", c, a, b);
    if constexpr (kTiles == 24) QWEN_WGMMA_A_IN_REGISTERS_24("1", "0", "bf16", c, a, b);
    if constexpr (kTiles == 32) QWEN_WGMMA_A_IN_REGISTERS_32("1", "0", "bf16", c, a, b);
  }
}

// Likewise c = a · b^T, whatever c was.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma_transposed_first(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kTiles == 4 || kTiles == 8);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 4) QWEN_WGMMA_A_IN_REGISTERS_4("0", "0", "f16", c, a, b);
    if constexpr (kTiles == 8) QWEN_WGMMA_A_IN_REGISTERS_8("0", "0", "f16", c, a, b);
  } else {
    if constexpr (kTiles == 4) QWEN_WGMMA_A_IN_REGISTERS_4("0", "0", "bf16", c, a, b);
    if constexpr (kTiles == 8) QWEN_WGMMA_A_IN_REGISTERS_8("0", "0", "bf16", c, a, b);
  }
}

#undef QWEN_WGMMA_A_IN_REGISTERS_32
#undef QWEN_WGMMA_A_IN_REGISTERS_24
#undef QWEN_WGMMA_A_IN_REGISTERS_16
#undef QWEN_WGMMA_A_IN_REGISTERS_8
#undef QWEN_WGMMA_A_IN_REGISTERS_4
#undef QWEN_WGMMA_A_IN_REGISTERS
#undef QWEN_WGMMA_ACCUMULATE
#undef QWEN_WGMMA_32
#undef QWEN_WGMMA_28
#undef QWEN_WGMMA_24
#undef QWEN_WGMMA_16
#undef QWEN_WGMMA_12
#undef QWEN_WGMMA_8
#undef QWEN_WGMMA_6
#undef QWEN_WGMMA_4
#undef QWEN_WGMMA_3
#undef QWEN_WGMMA_2
#undef QWEN_WGMMA
#undef QWEN_REGISTERS_32
#undef QWEN_REGISTERS_28
#undef QWEN_REGISTERS_24
#undef QWEN_REGISTERS_16
#undef QWEN_REGISTERS_12
#undef QWEN_REGISTERS_8
#undef QWEN_REGISTERS_6
#undef QWEN_REGISTERS_4
#undef QWEN_REGISTERS_3
#undef QWEN_REGISTERS_2
#undef QWEN_TILES_32
#undef QWEN_TILES_28
#undef QWEN_TILES_24
#undef QWEN_TILES_16
#undef QWEN_TILES_12
#undef QWEN_TILES_8
#undef QWEN_TILES_6
#undef QWEN_TILES_4
#undef QWEN_TILES_3
#undef QWEN_TILES_2
#undef QWEN_TILE

}  // namespace qwen_plugins
