// The streaming GEMM for few rows: reads the weight once, at the speed of memory.
//
// Tensor cores multiply (mma.m16n8k16): rows of x are operand a, tiles of 8 weight rows operand b. The sum over k may
// be taken in any order as long as a and b agree: lane (g, t) takes the 16 contiguous bytes of row g at 8 t of every 32
// elements, which are the b fragments of two mma instructions just as they lie in memory, and the a fragments likewise.
//
// A persistent kernel. The warps of a block split k in chunks: the elements of k in a 128-byte line of a weight row,
// and the lines of an x row that have the same elements (as many more as a weight is smaller). Each warp has its own
// ring buffer of loads in flight (cp.async), which runs on from tile to tile: the only barrier is one for each group of
// tiles, when the warps' partial sums are added.
//
// One block for each multiprocessor: it takes more than half of the shared memory, since two blocks could otherwise
// share one multiprocessor while another has none. With programmatic dependent launch blocks of the next GEMM start as
// blocks of this one finish. They fill their ring buffers with weights while the slowest blocks of this GEMM, and a
// normalisation between the two GEMMs, still run; only the loads of x wait for those.
#pragma once

#include "kernels/common/arithmetic.h"
#include "kernels/common/elements.cuh"
#include "kernels/common/programmatic_launch.cuh"
#include "kernels/common/tensor_cores.cuh"
#include "silu.cuh"
#include "stream.h"

namespace qwen_plugins {

constexpr int kTileRows = 8;  // weight rows: n of the mma
constexpr int kLineBytes = 128;
constexpr int kXBits = 16;                            // of an element of x
constexpr int kXLineK = 8 * kLineBytes / kXBits;      // elements of k in a line of x
constexpr int kWeightBits = 16;                       // of an element of the weight
constexpr int kChunk = 8 * kLineBytes / kWeightBits;  // elements of k in a line of the weight
constexpr int kXLines = kChunk / kXLineK;             // of an x row, in a chunk
constexpr int kLinePacks = kLineBytes / static_cast<int>(sizeof(FullPack));
constexpr int kTileBytes = kTileRows * kLineBytes;     // a chunk of a tile
constexpr int kXTileBytes = kXLines * 8 * kLineBytes;  // a chunk of 8 rows of x

// Where a warp finds the rows of x.
enum class XPlace {
  kShared,    // its chunks of all rows stay in shared memory
  kStreamed,  // they are loaded through the ring buffer with the weights: for x that is too large
};

// The tile and pipeline sizes of a kernel.
template <int kXTiles_, int kTiles_, XPlace kX_, int kWarps_, int kStages_>
struct StreamShape {
  static constexpr int kXTiles = kXTiles_;  // x has up to 8 kXTiles rows; 1 or 2
  static constexpr int kTiles = kTiles_;    // tiles that a block works on at a time
  static constexpr XPlace kX = kX_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kStages = kStages_;  // chunks that a warp's ring buffer holds
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kXStageBytes = kX == XPlace::kStreamed ? kXTiles * kXTileBytes : 0;
  static constexpr int kStageBytes = kTiles * kTileBytes + kXStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;  // of a warp
  static constexpr int kTileSums = 8 * kXTiles * kTileRows;
  static constexpr int kSums = kTiles * kTileSums;
  static constexpr int kSumBytes = 2 * kWarps * kSums * static_cast<int>(sizeof(float));
  // For __launch_bounds__: leaves registers for a normalisation's blocks beside the one of this kernel.
  static constexpr int kMinBlocks = kWarps == 16 ? 2 : 3;

  static constexpr int64_t shared_bytes(int64_t rows, int64_t in_features) {
    constexpr int64_t kChunksAtOnce = kWarps * kChunk;
    const int64_t chunks = divide_up(in_features, kChunksAtOnce) * kWarps;
    return kWarps * kRingBytes + kSumBytes + (kX == XPlace::kShared ? chunks * rows * kXLines * kLineBytes : 0);
  }
};

// As cp_async_16, with the hint to load the whole 128-byte line to the L2 cache.
__device__ __forceinline__ void cp_async_16_of_line(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}
// As cp_async_wait, for a warp: its lanes then see each other's loads.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_warp() {
  cp_async_wait<kPending>();
  __syncwarp();
}

// Byte offset of a pack inside lines of 128 bytes. The halves of a line are swapped in odd rows, so that the 8 lanes
// whose 16-byte accesses are served together, to 64 bytes of two rows each, use 32 different banks.
__device__ __forceinline__ int pack_offset(int row, int pack) {
  return row * kLineBytes + (pack ^ (row % 2 * (kLinePacks / 2))) * static_cast<int>(sizeof(FullPack));
}

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / 32; }

// Issues the loads of a warp's chunks of the weight into its ring buffer, group after group of tiles, as far ahead of
// the mma instructions as the ring buffer is long.
template <typename T, typename Shape>
class WeightLoads {
 public:
  __device__ __forceinline__ explicit WeightLoads(const StreamArguments& arguments)
      : p(arguments), group(blockIdx.x), chunk(warp_of_thread()) {
    if (chunk >= p.chunks) group = p.groups;
    find_group();
  }

  // Loads one tile of the current chunk to `stage`. Past the last chunk it does nothing.
  __device__ __forceinline__ void load(int tile, uint32_t stage) const {
    if (group >= p.groups) return;
    const int line = lane_of_thread() / kLinePacks, pack = lane_of_thread() % kLinePacks;
    const int k = chunk * kChunk + pack * kVec<T>;
    const T* from = first + tile * p.tile_stride + chunk * kChunk;
    const int in_group = line + tile * p.tile_columns;
    const int end = min(p.group_columns, p.columns - group * p.group_columns);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = k < p.in_features && in_group + half * p.half_columns < end;
      const int row = line + half * (kTileRows / 2);
      cp_async_16_of_line(stage + tile * kTileBytes + pack_offset(row, pack), from + half * p.half_stride, inside);
    }
  }

  // Loads as many chunks as the ring buffer has stages, each tile as a group of cp.async.
  __device__ __forceinline__ void fill(const unsigned char* ring) {
#pragma unroll
    for (int stage = 0; stage < Shape::kStages; ++stage) {
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
        load(tile, shared_address(ring + stage * Shape::kStageBytes));
        cp_async_commit();
      }
      advance();
    }
  }

  __device__ __forceinline__ void advance() {
    chunk += Shape::kWarps;
    if (chunk < p.chunks || group >= p.groups) return;
    chunk = warp_of_thread();
    group += gridDim.x;
    find_group();
  }

  const StreamArguments& p;
  int group;
  int chunk;

 private:
  __device__ __forceinline__ int first_column() const {
    return group * p.group_columns + lane_of_thread() / kLinePacks;
  }
  __device__ __forceinline__ void find_group() {
    first = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_column()) * p.in_features +
            lane_of_thread() % kLinePacks * kVec<T>;
  }

  const T* first;  // this lane's first element of chunk 0 of the group
};

// Loads a chunk of one row of x, with 8 lanes. In shared memory the first lines of `rows` rows are followed by their
// second lines, and so on.
template <typename T>
__device__ __forceinline__ void load_x_row(const StreamArguments& p, int chunk, int row, int rows, uint32_t lines) {
  const int pack = lane_of_thread() % kLinePacks;
#pragma unroll
  for (int line = 0; line < kXLines; ++line) {
    const int k = chunk * kChunk + line * kXLineK + pack * kVec<T>;
    cp_async_16_of_line(lines + line * rows * kLineBytes + pack_offset(row, pack),
                        static_cast<const T*>(p.x) + row * p.x_row_stride + k, k < p.in_features);
  }
}

constexpr int kLinesAtOnce = 32 / kLinePacks;

// Loads a chunk of all rows of x.
template <typename T, typename Shape>
__device__ __forceinline__ void load_x_chunk(const StreamArguments& p, int chunk, int rows, uint32_t lines) {
#pragma unroll
  for (int first = 0; first < 8 * Shape::kXTiles; first += kLinesAtOnce) {
    const int row = first + lane_of_thread() / kLinePacks;
    if (row < p.rows) load_x_row<T>(p, chunk, row, rows, lines);
  }
}

// Loads all chunks of x that this warp multiplies; with few rows several chunks at a time, so that no lanes are idle.
template <typename T, typename Shape>
__device__ __forceinline__ void load_x_of_warp(const StreamArguments& p, uint32_t lines) {
  const auto chunk = [](int i) { return warp_of_thread() + i * Shape::kWarps; };
  const auto place = [&](int i) { return lines + i * p.rows * kXLines * kLineBytes; };
  if (p.rows >= kLinesAtOnce) {
    for (int i = 0; i < p.chunks_of_warp; ++i) load_x_chunk<T, Shape>(p, chunk(i), p.rows, place(i));
    return;
  }
  for (int row = 0; row < p.rows; ++row) {
    for (int i = lane_of_thread() / kLinePacks; i < p.chunks_of_warp; i += kLinesAtOnce) {
      load_x_row<T>(p, chunk(i), row, p.rows, place(i));
    }
  }
}

// Loads the first chunks of x into the stages of the warp's ring buffer, or all that it multiplies to `x_lines`.
template <typename T, typename Shape>
__device__ __forceinline__ void load_first_x(const StreamArguments& p, const unsigned char* ring,
                                             const unsigned char* x_lines) {
  if constexpr (Shape::kX == XPlace::kStreamed) {
    for (int stage = 0, chunk = warp_of_thread(); stage < Shape::kStages; ++stage) {
      load_x_chunk<T, Shape>(p, chunk, 8 * Shape::kXTiles,
                             shared_address(ring + stage * Shape::kStageBytes + Shape::kTiles * kTileBytes));
      chunk = chunk + Shape::kWarps < p.chunks ? chunk + Shape::kWarps : warp_of_thread();
    }
  } else {
    load_x_of_warp<T, Shape>(p, shared_address(x_lines));
  }
  cp_async_commit();
}

// A lane's operands of a line, of one row of a tile or of x.
struct Fragments {
  FullPack packs[2];

  __device__ __forceinline__ void load(const unsigned char* lines, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      packs[i] = *reinterpret_cast<const FullPack*>(lines + pack_offset(row, i * 4 + lane_of_thread() % 4));
    }
  }
};

// Reads a chunk of x. Lanes of rows that x does not have read its last row: their sums are not used.
template <typename Shape>
__device__ __forceinline__ void read_x_chunk(Fragments (&x)[kXLines][Shape::kXTiles], const unsigned char* lines,
                                             int line_bytes, int rows) {
#pragma unroll
  for (int line = 0; line < kXLines; ++line) {
    for (int h = 0; h < Shape::kXTiles; ++h) {
      x[line][h].load(lines + line * line_bytes, min(lane_of_thread() / 4 + 8 * h, rows - 1));
    }
  }
}

// A chunk of a tile times a chunk of x. The only place that sees weights as operands: one stored in another type would
// be converted here.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply_chunk(float (&sums)[4], const Fragments (&x)[kXLines][Shape::kXTiles],
                                               const Fragments& weight) {
  static_assert(kXLines == 1, "a line of weights of another size meets several lines of x");
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const FullPack low = x[0][0].packs[i];
      const FullPack high = Shape::kXTiles == 2 ? x[0][Shape::kXTiles - 1].packs[i] : FullPack{};
      const uint32_t a[4] = {low.words[j], high.words[j], low.words[j + 1], high.words[j + 1]};
      mma_m16n8k16<T>(sums, a, weight.packs[i].words[j], weight.packs[i].words[j + 1]);
    }
  }
}

// Writes a warp's partial sums of a tile for finish_group, [row of x][row of tile].
template <typename Shape>
__device__ __forceinline__ void write_sums(float* of_tile, const float (&sums)[4]) {
  const int g = lane_of_thread() / 4, t = lane_of_thread() % 4;
#pragma unroll
  for (int h = 0; h < Shape::kXTiles; ++h) {
    *reinterpret_cast<float2*>(of_tile + (g + 8 * h) * kTileRows + 2 * t) = make_float2(sums[2 * h], sums[2 * h + 1]);
  }
}

// Adds the warps' partial sums and writes y. With SwiGLU a tile holds 4 gate rows and the 4 up rows that belong to
// them.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_group(const StreamArguments& p, int group, const float* of_warps) {
  for (int index = threadIdx.x; index < Shape::kSums; index += Shape::kThreads) {
    const int row = index / kTileRows % (8 * Shape::kXTiles);
    const int n = index % kTileRows;
    const bool in_second_half = n >= kTileRows / 2;
    const int in_group =
        index / Shape::kTileSums * p.tile_columns + n % (kTileRows / 2) + in_second_half * p.half_columns;
    const int column = group * p.group_columns + in_group;
    float z = 0.0F;
    if (p.bias != nullptr && column < p.columns) {
      z = to_float(static_cast<const T*>(p.bias)[column + in_second_half * p.half_bias]);
    }
#pragma unroll
    for (int warp = 0; warp < Shape::kWarps; ++warp) z += of_warps[warp * Shape::kSums + index];
    bool writes = row < p.rows && in_group < p.group_columns && column < p.columns;
    if (p.swiglu) {
      const float up = __shfl_down_sync(0xffffffffU, z, kTileRows / 2);
      z = silu<T>(z) * up;
      writes = writes && !in_second_half;
    }
    if (writes) static_cast<T*>(p.y)[static_cast<int64_t>(row) * p.columns + column] = from_float<T>(z);
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kMinBlocks)
    gemm_stream(const __grid_constant__ StreamArguments p) {
  trigger_dependent_launch();
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr bool kStreamsX = Shape::kX == XPlace::kStreamed;
  constexpr int kPending = Shape::kStages * Shape::kTiles;
  const unsigned char* ring = shared + warp_of_thread() * Shape::kRingBytes;
  auto* sums_of_warps = reinterpret_cast<float*>(shared + Shape::kWarps * Shape::kRingBytes);
  // The chunks of x that this warp multiplies, one after another; only this warp reads them.
  const int x_line_bytes = (kStreamsX ? 8 * Shape::kXTiles : p.rows) * kLineBytes;  // of a line of all rows
  const int x_bytes = p.rows * kXLines * kLineBytes;
  const unsigned char* x_lines =
      shared + Shape::kWarps * Shape::kRingBytes + Shape::kSumBytes + warp_of_thread() * p.chunks_of_warp * x_bytes;

  if (!p.constant_weight) {
    wait_for_previous_kernel();
    load_first_x<T, Shape>(p, ring, x_lines);
  }
  WeightLoads<T, Shape> loads(p);
  loads.fill(ring);
  if (p.constant_weight) {
    wait_for_previous_kernel();
    load_first_x<T, Shape>(p, ring, x_lines);
    cp_async_wait_warp<0>();
  } else {
    cp_async_wait_warp<kPending>();
  }

  int stage_offset = 0;
  int parity = 0;
  for (int group = blockIdx.x; group < p.groups; group += gridDim.x) {
    float sums[Shape::kTiles][4] = {};
    const unsigned char* x_chunk = x_lines;
    for (int chunk = warp_of_thread(); chunk < p.chunks; chunk += Shape::kWarps) {
      const unsigned char* stage = ring + stage_offset;
      Fragments x[kXLines][Shape::kXTiles];
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) {
        cp_async_wait_warp<kPending - 1>();
        if (tile == 0) {
          read_x_chunk<Shape>(x, kStreamsX ? stage + Shape::kTiles * kTileBytes : x_chunk, x_line_bytes, p.rows);
          x_chunk += x_bytes;
        }
        Fragments weight;
        weight.load(stage + tile * kTileBytes, lane_of_thread() / 4);
        multiply_chunk<T, Shape>(sums[tile], x, weight);
        __syncwarp();  // all lanes have read what the next loads overwrite
        if (kStreamsX && tile == 0 && loads.group < p.groups) {
          load_x_chunk<T, Shape>(p, loads.chunk, 8 * Shape::kXTiles,
                                 shared_address(stage + Shape::kTiles * kTileBytes));
        }
        loads.load(tile, shared_address(stage));
        cp_async_commit();
      }
      loads.advance();
      stage_offset = stage_offset + Shape::kStageBytes == Shape::kRingBytes ? 0 : stage_offset + Shape::kStageBytes;
    }
    float* sums_of_group = sums_of_warps + parity * Shape::kWarps * Shape::kSums;
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      write_sums<Shape>(sums_of_group + warp_of_thread() * Shape::kSums + tile * Shape::kTileSums, sums[tile]);
    }
    __syncthreads();  // one is enough: the next group's sums go to the other buffer
    finish_group<T, Shape>(p, group, sums_of_group);
    parity ^= 1;
  }
}

}  // namespace qwen_plugins
