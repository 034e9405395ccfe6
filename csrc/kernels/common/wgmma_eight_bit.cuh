// wgmma of 8-bit codes (sm_90a): int8 summed in int32, e4m3 in float32. wgmma.cuh has the rest.
#pragma once

#include "wgmma.cuh"

namespace qwen_plugins {

// clang-format off
#define QWEN_TILE(type, c, i) type((c)[i][0]), type((c)[i][1]), type((c)[i][2]), type((c)[i][3])
#define QWEN_TILES_1(type, c) QWEN_TILE(type, c, 0)
#define QWEN_TILES_2(type, c) QWEN_TILES_1(type, c), QWEN_TILE(type, c, 1)
#define QWEN_TILES_3(type, c) QWEN_TILES_2(type, c), QWEN_TILE(type, c, 2)
#define QWEN_TILES_4(type, c) QWEN_TILES_3(type, c), QWEN_TILE(type, c, 3)
#define QWEN_TILES_6(type, c) QWEN_TILES_4(type, c), QWEN_TILE(type, c, 4), QWEN_TILE(type, c, 5)
#define QWEN_TILES_8(type, c) QWEN_TILES_6(type, c), QWEN_TILE(type, c, 6), QWEN_TILE(type, c, 7)
#define QWEN_TILES_12(type, c) QWEN_TILES_8(type, c), \
    QWEN_TILE(type, c, 8), QWEN_TILE(type, c, 9), QWEN_TILE(type, c, 10), QWEN_TILE(type, c, 11)
#define QWEN_TILES_16(type, c) QWEN_TILES_12(type, c), \
    QWEN_TILE(type, c, 12), QWEN_TILE(type, c, 13), QWEN_TILE(type, c, 14), QWEN_TILE(type, c, 15)
#define QWEN_TILES_24(type, c) QWEN_TILES_16(type, c), \
    QWEN_TILE(type, c, 16), QWEN_TILE(type, c, 17), QWEN_TILE(type, c, 18), QWEN_TILE(type, c, 19), \
    QWEN_TILE(type, c, 20), QWEN_TILE(type, c, 21), QWEN_TILE(type, c, 22), QWEN_TILE(type, c, 23)
#define QWEN_TILES_28(type, c) QWEN_TILES_24(type, c), \
    QWEN_TILE(type, c, 24), QWEN_TILE(type, c, 25), QWEN_TILE(type, c, 26), QWEN_TILE(type, c, 27)
#define QWEN_TILES_32(type, c) QWEN_TILES_28(type, c), \
    QWEN_TILE(type, c, 28), QWEN_TILE(type, c, 29), QWEN_TILE(type, c, 30), QWEN_TILE(type, c, 31)
#define QWEN_REGISTERS_1 "%0, %1, %2, %3"
#define QWEN_REGISTERS_2 QWEN_REGISTERS_1 ", %4, %5, %6, %7"
#define QWEN_REGISTERS_3 QWEN_REGISTERS_2 ", %8, %9, %10, %11"
#define QWEN_REGISTERS_4 QWEN_REGISTERS_3 ", %12, %13, %14, %15"
#define QWEN_REGISTERS_6 QWEN_REGISTERS_4 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define QWEN_REGISTERS_8 QWEN_REGISTERS_6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define QWEN_REGISTERS_12 QWEN_REGISTERS_8 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define QWEN_REGISTERS_16 QWEN_REGISTERS_12 \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QWEN_REGISTERS_24 QWEN_REGISTERS_16 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QWEN_REGISTERS_28 QWEN_REGISTERS_24 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define QWEN_REGISTERS_32 QWEN_REGISTERS_28 \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QWEN_WGMMA(types, scales, n, registers, tiles, operand_a, operand_b, operand_accumulate) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " operand_accumulate ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" n "k32." types " {" registers "}, " operand_a ", " operand_b \
               ", p" scales ";\n}" : tiles : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define QWEN_WGMMA_OF(types, scales, type) \
  if constexpr (kTiles == 1) \
    QWEN_WGMMA(types, scales, "8", QWEN_REGISTERS_1, QWEN_TILES_1(type, c), "%4", "%5", "%6"); \
  if constexpr (kTiles == 2) \
    QWEN_WGMMA(types, scales, "16", QWEN_REGISTERS_2, QWEN_TILES_2(type, c), "%8", "%9", "%10"); \
  if constexpr (kTiles == 3) \
    QWEN_WGMMA(types, scales, "24", QWEN_REGISTERS_3, QWEN_TILES_3(type, c), "%12", "%13", "%14"); \
  if constexpr (kTiles == 4) \
    QWEN_WGMMA(types, scales, "32", QWEN_REGISTERS_4, QWEN_TILES_4(type, c), "%16", "%17", "%18"); \
  if constexpr (kTiles == 6) \
    QWEN_WGMMA(types, scales, "48", QWEN_REGISTERS_6, QWEN_TILES_6(type, c), "%24", "%25", "%26"); \
  if constexpr (kTiles == 8) \
    QWEN_WGMMA(types, scales, "64", QWEN_REGISTERS_8, QWEN_TILES_8(type, c), "%32", "%33", "%34"); \
  if constexpr (kTiles == 12) \
    QWEN_WGMMA(types, scales, "96", QWEN_REGISTERS_12, QWEN_TILES_12(type, c), "%48", "%49", "%50"); \
  if constexpr (kTiles == 16) \
    QWEN_WGMMA(types, scales, "128", QWEN_REGISTERS_16, QWEN_TILES_16(type, c), "%64", "%65", "%66"); \
  if constexpr (kTiles == 24) \
    QWEN_WGMMA(types, scales, "192", QWEN_REGISTERS_24, QWEN_TILES_24(type, c), "%96", "%97", "%98"); \
  if constexpr (kTiles == 28) \
    QWEN_WGMMA(types, scales, "224", QWEN_REGISTERS_28, QWEN_TILES_28(type, c), "%112", "%113", "%114"); \
  if constexpr (kTiles == 32) \
    QWEN_WGMMA(types, scales, "256", QWEN_REGISTERS_32, QWEN_TILES_32(type, c), "%128", "%129", "%130")
// clang-format on

// c [64 x 8 kTiles] += a [64 x 32] · b [8 kTiles x 32]^T, or c = a · b^T if not `accumulate`, with codes of int8 where
// c is int32_t, and of e4m3 where it is float. The layouts are those of wgmma.cuh, with two codes for each 16-bit
// element.
template <typename Sum, int kTiles>
__device__ __forceinline__ void wgmma_of_codes(Sum (&c)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 3 || kTiles == 4 || kTiles == 6 || kTiles == 8 ||
                kTiles == 12 || kTiles == 16 || kTiles == 24 || kTiles == 28 || kTiles == 32);
  if constexpr (std::is_same_v<Sum, int32_t>) {
    QWEN_WGMMA_OF("s32.s8.s8", "", "+r");
  } else {
    static_assert(std::is_same_v<Sum, float>);
    QWEN_WGMMA_OF("f32.e4m3.e4m3", ", 1, 1", "+f");
  }
}

#undef QWEN_WGMMA_OF
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
#undef QWEN_REGISTERS_1
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
#undef QWEN_TILES_1
#undef QWEN_TILE

}  // namespace qwen_plugins
