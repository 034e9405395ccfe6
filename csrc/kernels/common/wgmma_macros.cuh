// The text of wgmma instructions for each number of tiles of 8 columns that they compute, for wgmma.cuh and
// wgmma_eight_bit.cuh: inline assembly takes neither arrays of registers nor numbers.
#pragma once

// clang-format off
// The accumulators c[kTiles][4] as operands of inline assembly; `constraint` is "+f" or "+r".
#define QWEN_TILE(constraint, c, i) constraint((c)[i][0]), constraint((c)[i][1]), constraint((c)[i][2]), constraint((c)[i][3])
#define QWEN_TILES_1(constraint, c) QWEN_TILE(constraint, c, 0)
#define QWEN_TILES_2(constraint, c) QWEN_TILES_1(constraint, c), QWEN_TILE(constraint, c, 1)
#define QWEN_TILES_3(constraint, c) QWEN_TILES_2(constraint, c), QWEN_TILE(constraint, c, 2)
#define QWEN_TILES_4(constraint, c) QWEN_TILES_3(constraint, c), QWEN_TILE(constraint, c, 3)
#define QWEN_TILES_6(constraint, c) QWEN_TILES_4(constraint, c), QWEN_TILE(constraint, c, 4), QWEN_TILE(constraint, c, 5)
#define QWEN_TILES_8(constraint, c) QWEN_TILES_6(constraint, c), QWEN_TILE(constraint, c, 6), QWEN_TILE(constraint, c, 7)
#define QWEN_TILES_12(constraint, c) QWEN_TILES_8(constraint, c), \
    QWEN_TILE(constraint, c, 8), QWEN_TILE(constraint, c, 9), QWEN_TILE(constraint, c, 10), QWEN_TILE(constraint, c, 11)
#define QWEN_TILES_16(constraint, c) QWEN_TILES_12(constraint, c), \
    QWEN_TILE(constraint, c, 12), QWEN_TILE(constraint, c, 13), QWEN_TILE(constraint, c, 14), QWEN_TILE(constraint, c, 15)
#define QWEN_TILES_24(constraint, c) QWEN_TILES_16(constraint, c), \
    QWEN_TILE(constraint, c, 16), QWEN_TILE(constraint, c, 17), QWEN_TILE(constraint, c, 18), QWEN_TILE(constraint, c, 19), \
    QWEN_TILE(constraint, c, 20), QWEN_TILE(constraint, c, 21), QWEN_TILE(constraint, c, 22), QWEN_TILE(constraint, c, 23)
#define QWEN_TILES_28(constraint, c) QWEN_TILES_24(constraint, c), \
    QWEN_TILE(constraint, c, 24), QWEN_TILE(constraint, c, 25), QWEN_TILE(constraint, c, 26), QWEN_TILE(constraint, c, 27)
#define QWEN_TILES_32(constraint, c) QWEN_TILES_28(constraint, c), \
    QWEN_TILE(constraint, c, 28), QWEN_TILE(constraint, c, 29), QWEN_TILE(constraint, c, 30), QWEN_TILE(constraint, c, 31)
// Their names in the text.
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

// form(n, registers, tiles, the names of the five operands behind the accumulators, ...) for a number of tiles.
#define QWEN_WGMMA_1(form, ...) form("8", QWEN_REGISTERS_1, QWEN_TILES_1, "%4", "%5", "%6", "%7", "%8", __VA_ARGS__)
#define QWEN_WGMMA_2(form, ...) form("16", QWEN_REGISTERS_2, QWEN_TILES_2, "%8", "%9", "%10", "%11", "%12", __VA_ARGS__)
#define QWEN_WGMMA_3(form, ...) form("24", QWEN_REGISTERS_3, QWEN_TILES_3, "%12", "%13", "%14", "%15", "%16", __VA_ARGS__)
#define QWEN_WGMMA_4(form, ...) form("32", QWEN_REGISTERS_4, QWEN_TILES_4, "%16", "%17", "%18", "%19", "%20", __VA_ARGS__)
#define QWEN_WGMMA_6(form, ...) form("48", QWEN_REGISTERS_6, QWEN_TILES_6, "%24", "%25", "%26", "%27", "%28", __VA_ARGS__)
#define QWEN_WGMMA_8(form, ...) form("64", QWEN_REGISTERS_8, QWEN_TILES_8, "%32", "%33", "%34", "%35", "%36", __VA_ARGS__)
#define QWEN_WGMMA_12(form, ...) form("96", QWEN_REGISTERS_12, QWEN_TILES_12, "%48", "%49", "%50", "%51", "%52", __VA_ARGS__)
#define QWEN_WGMMA_16(form, ...) form("128", QWEN_REGISTERS_16, QWEN_TILES_16, "%64", "%65", "%66", "%67", "%68", __VA_ARGS__)
#define QWEN_WGMMA_24(form, ...) form("192", QWEN_REGISTERS_24, QWEN_TILES_24, "%96", "%97", "%98", "%99", "%100", __VA_ARGS__)
#define QWEN_WGMMA_28(form, ...) form("224", QWEN_REGISTERS_28, QWEN_TILES_28, "%112", "%113", "%114", "%115", "%116", __VA_ARGS__)
#define QWEN_WGMMA_32(form, ...) form("256", QWEN_REGISTERS_32, QWEN_TILES_32, "%128", "%129", "%130", "%131", "%132", __VA_ARGS__)
// form(...) for kTiles, a constant.
#define QWEN_WGMMA_OF_TILES(form, ...) \
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 3 || kTiles == 4 || kTiles == 6 || kTiles == 8 || \
                kTiles == 12 || kTiles == 16 || kTiles == 24 || kTiles == 28 || kTiles == 32); \
  if constexpr (kTiles == 1) QWEN_WGMMA_1(form, __VA_ARGS__); \
  if constexpr (kTiles == 2) QWEN_WGMMA_2(form, __VA_ARGS__); \
  if constexpr (kTiles == 3) QWEN_WGMMA_3(form, __VA_ARGS__); \
  if constexpr (kTiles == 4) QWEN_WGMMA_4(form, __VA_ARGS__); \
  if constexpr (kTiles == 6) QWEN_WGMMA_6(form, __VA_ARGS__); \
  if constexpr (kTiles == 8) QWEN_WGMMA_8(form, __VA_ARGS__); \
  if constexpr (kTiles == 12) QWEN_WGMMA_12(form, __VA_ARGS__); \
  if constexpr (kTiles == 16) QWEN_WGMMA_16(form, __VA_ARGS__); \
  if constexpr (kTiles == 24) QWEN_WGMMA_24(form, __VA_ARGS__); \
  if constexpr (kTiles == 28) QWEN_WGMMA_28(form, __VA_ARGS__); \
  if constexpr (kTiles == 32) QWEN_WGMMA_32(form, __VA_ARGS__)
// form(...) for kTiles and the type T, __half or __nv_bfloat16.
#define QWEN_WGMMA_OF_16_BITS(form, flags, ...) \
  if constexpr (std::is_same_v<T, __half>) { \
    QWEN_WGMMA_OF_TILES(form, "k16.f32.f16.f16", flags, "+f", __VA_ARGS__); \
  } else { \
    QWEN_WGMMA_OF_TILES(form, "k16.f32.bf16.bf16", flags, "+f", __VA_ARGS__); \
  }

// c += a · b, a and b given by matrix descriptors. `types` has the k of the instruction, too; `flags` are the immediates
// behind the one for accumulation.
#define QWEN_WGMMA_SHARED(n, registers, tiles, o0, o1, o2, o3, o4, types, flags, constraint, c, a, b) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n types " {" registers "}, " o0 ", " o1 ", 1" flags ";" \
               : tiles(constraint, c) : "l"(a), "l"(b))
// Likewise, or c = a · b where the integer `accumulate` is 0.
#define QWEN_WGMMA_ACCUMULATE(n, registers, tiles, o0, o1, o2, o3, o4, types, flags, constraint, c, a, b, accumulate) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o2 ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" n types " {" registers "}, " o0 ", " o1 ", p" flags ";\n}" \
               : tiles(constraint, c) : "l"(a), "l"(b), "r"(accumulate))
// Likewise with a in registers; `accumulate` is the text "1" or "0".
#define QWEN_WGMMA_A_IN_REGISTERS(n, registers, tiles, o0, o1, o2, o3, o4, types, flags, constraint, c, a, b, accumulate) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n types " {" registers "}, {" o0 ", " o1 ", " o2 ", " o3 "}, " o4 \
               ", " accumulate flags ";" \
               : tiles(constraint, c) : "r"((a)[0]), "r"((a)[1]), "r"((a)[2]), "r"((a)[3]), "l"(b))
// clang-format on
