// The RMSNorm kernels. rms_norm.cu chooses among them and launches.
//
// What makes them fast, most important first (docs/rms_norm.md says more): all loads of a row are in flight before the
// first of them is used; one block a row with the row in registers, one barrier, no loop; programmatic dependent
// launch; few parameters, and no division, square root or other slow path between load and store.
#pragma once

#include <cfloat>

#include "kernels/common/elements.cuh"
#include "kernels/common/programmatic_launch.cuh"

namespace qwen_plugins {

// How a block finds its row: blockIdx.x (with threadIdx.y, in the kernel for short rows) is the row within its group,
// blockIdx.y the group. Strides are in elements.
struct RowIndexing {
  int64_t row_stride;
  int64_t group_stride;
};

// Parameters of the kernels. What the common case reads comes first: the constant cache is cold at every launch.
struct RmsNormArguments {
  const void* x;
  const void* weight;
  void* output;  // y, or the quantized q
  RowIndexing x_rows;
  RowIndexing output_rows;
  int32_t length;  // packs in a row, or elements where the kernel works by elements
  uint32_t rows_in_group;
  float eps;
  float inverse_hidden_size;
  float weight_offset;  // 1 where the weight is stored as its difference from 1
  uint32_t options;     // RmsNormOption bits
  const void* residual;
  void* residual_out;
  RowIndexing residual_rows;
  RowIndexing residual_out_rows;
  const float* static_scale;
  float* scales;
  RowIndexing scale_rows;
  const void* smoothing;
  double precise_inverse_hidden_size;
};

enum RmsNormOption : uint32_t {
  kFloat32Weight = 1,      // the weight is float32, x is not
  kRoundBeforeWeight = 2,  // round h * rstd to the type of x before multiplying by the weight
  kFloat32Smoothing = 4,
  kCacheRow = 8,  // rms_norm_long_row: shared memory has room for the row
};

// What the kernels write.
enum class Output { kSameType, kInt8, kFloat8E4M3 };

template <Output kOutput>
constexpr float kLargestQuantized = kOutput == Output::kInt8 ? 127.0F : 448.0F;

template <typename T>
__device__ __forceinline__ T* at(T* base, RowIndexing rows, int64_t row) {
  return base + (static_cast<int64_t>(blockIdx.y) * rows.group_stride + row * rows.row_stride);
}

// float32 rows are summed in float64, so that their result is correct to the last place.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, float>, double, float>;

// The result of one pass over a row. `largest` is the maximum of |h * w|, for the dynamic scale.
template <typename T>
struct RowStatistics {
  Accumulator<T> sum_of_squares = 0;
  float largest = 0.0F;

  template <bool kNeedsLargest>
  __device__ __forceinline__ void add_lane(int distance) {
    sum_of_squares += __shfl_xor_sync(0xffffffffU, sum_of_squares, distance);
    if constexpr (kNeedsLargest) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, distance));
  }
};

// Combines the statistics of all threads of a block, at most kMaxThreads; every thread gets the result.
template <typename T, bool kNeedsLargest, int kMaxThreads>
__device__ __forceinline__ void reduce_over_block(RowStatistics<T>& statistics) {
  __shared__ RowStatistics<T> of_warp[kMaxThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) statistics.template add_lane<kNeedsLargest>(distance);
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) of_warp[threadIdx.x / 32] = statistics;
  __syncthreads();
  const unsigned warp = lane % (kMaxThreads / 32);  // lanes beyond the number of warps repeat, for the shuffles below
  statistics = warp < blockDim.x / 32 ? of_warp[warp] : RowStatistics<T>();
#pragma unroll
  for (int distance = kMaxThreads / 64; distance > 0; distance /= 2) {
    statistics.template add_lane<kNeedsLargest>(distance);
  }
}

// 1 / sqrt(mean + eps), for float32 rows as the sum of two float32 numbers.
template <typename T>
struct ReciprocalRms {
  float value;
  float rest = 0.0F;

  __device__ __forceinline__ ReciprocalRms(Accumulator<T> sum_of_squares, const RmsNormArguments& p) {
    if constexpr (std::is_same_v<T, float>) {
      const double exact = rsqrt(sum_of_squares * p.precise_inverse_hidden_size + static_cast<double>(p.eps));
      value = static_cast<float>(exact);
      rest = static_cast<float>(exact - static_cast<double>(value));
    } else {
      value = rsqrtf(sum_of_squares * p.inverse_hidden_size + p.eps);
    }
  }

  template <int kWidth>
  __device__ __forceinline__ void normalize(float (&values)[kWidth], const float (&weight)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float normalized = values[i] * value;
      if constexpr (std::is_same_v<T, float>) {
        const float error = fmaf(values[i], value, -normalized) + values[i] * rest;
        values[i] = fmaf(normalized, weight[i], error * weight[i]);
      } else {
        values[i] = normalized * weight[i];
      }
    }
  }

  // As Hugging Face's modules do: rounded to the type of x before multiplying by the weight, and after it.
  template <int kWidth>
  __device__ __forceinline__ void normalize_rounding_twice(float (&values)[kWidth],
                                                           const float (&weight)[kWidth]) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(from_float<T>(values[i] * value)) * weight[i];
  }
};

// Loads the static scale, if there is one: early, since nothing hides the latency of a load after the reduction.
__device__ __forceinline__ float load_static_scale(const RmsNormArguments& p) {
  return p.static_scale == nullptr ? 0.0F : *p.static_scale;
}

// The factor from h * w to the quantized value. Writes the row's scale where it is dynamic.
template <Output kOutput>
__device__ __forceinline__ float quantization_factor(const RmsNormArguments& p, float static_scale, float rstd,
                                                     float largest, int64_t row, bool writes_scale) {
  float scale = static_scale;
  if (p.static_scale == nullptr) {
    scale = largest * rstd * (1.0F / kLargestQuantized<kOutput>);
    scale = scale < FLT_MIN ? FLT_MIN : scale;  // a row of zeros; NaN stays
    if (writes_scale) *at(p.scales, p.scale_rows, row) = scale;
  }
  // The approximate quotient needs a divisor from 2^-126 to 2^126.
  const float shift = scale < FLT_MIN ? 0x1p24F : scale > 0x1p126F ? 0.25F : 1.0F;
  const float factor = __fdividef(rstd * shift, scale * shift);
  return factor > FLT_MAX ? FLT_MAX : factor;  // finite, so that zeros stay zeros; NaN stays
}

// Quantizes a pack's elements, or one, and stores them as group `index` of a row.
template <Output kOutput, int kWidth>
__device__ __forceinline__ void store_quantized(uint8_t* row, int64_t index, const float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    row[index] =
        static_cast<uint8_t>(kOutput == Output::kInt8 ? to_int8_bits(values[0]) : to_float8_e4m3_bits(values[0]));
  } else {
    Pack<kWidth / 4> quantized;
#pragma unroll
    for (int k = 0; k < kWidth / 4; ++k) {
      const float part[4] = {values[4 * k], values[4 * k + 1], values[4 * k + 2], values[4 * k + 3]};
      quantized.words[k] = kOutput == Output::kInt8 ? to_int8x4(part) : to_float8_e4m3x4(part);
    }
    reinterpret_cast<Pack<kWidth / 4>*>(row)[index] = quantized;
  }
}

// How a kernel reads the weight. kPlain keeps the code of the common case small: with few rows, fetching instructions
// takes a good part of the time.
enum class WeightMode {
  kPlain,    // of the type of x; weight_offset is added
  kGeneral,  // also float32, divided by the smoothing, or multiplied after a rounding (RmsNormOption)
};

// The weights of one thread: packed as they are, or as float32 with offset and smoothing applied, which do not need h.
template <typename T, int kPacks, WeightMode kMode>
struct ThreadWeights {
  static constexpr bool kGeneral = kMode == WeightMode::kGeneral;
  FullPack packed[kGeneral ? 1 : kPacks];
  float values[kGeneral ? kPacks : 1][kVec<T>];
  float offset;

  __device__ __forceinline__ void load(int j, int index, const RmsNormArguments& p) {
    offset = p.weight_offset;
    if constexpr (!kGeneral) {
      packed[j] = static_cast<const FullPack*>(p.weight)[index];
    } else {
      load_as_float<T>(values[j], p.weight, index, p.options & kFloat32Weight);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) values[j][i] += offset;
      if (p.smoothing == nullptr) return;
      float smoothing[kVec<T>];
      load_as_float<T>(smoothing, p.smoothing, index, p.options & kFloat32Smoothing);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) values[j][i] /= smoothing[i];
    }
  }

  __device__ __forceinline__ void get(int j, float (&weight)[kVec<T>]) const {
    if constexpr (kGeneral) {
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) weight[i] = values[j][i];
    } else {
      unpack<T>(weight, packed[j]);
#pragma unroll
      for (int i = 0; i < kVec<T>; ++i) weight[i] += offset;
    }
  }
};

// The limit of a thread's registers. Occupancy is worth more than a few more registers, but spilled registers cost more
// than either.
template <typename T>
constexpr int registers_for(int packs, int max_threads, bool residual, WeightMode weight_mode) {
  if (max_threads == 32) return 128;
  if (weight_mode == WeightMode::kGeneral && packs > 2 && max_threads <= 512) return 96;
  if (weight_mode == WeightMode::kGeneral || std::is_same_v<T, float> || packs > 2) return 64;
  return residual && packs > 1 ? 40 : 32;
}

constexpr int kRegistersOfMultiprocessor = 65536;
constexpr unsigned kFewRows = 16;  // of a decode step

// Of the target architecture; the host reads that of the device (DeviceProperties).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ % 100 != 0 || __CUDA_ARCH__ >= 1200)
constexpr int kThreadsOfMultiprocessor = 1536;
#else
constexpr int kThreadsOfMultiprocessor = 2048;
#endif

template <typename T>
constexpr int min_blocks(int packs, int max_threads, bool residual, WeightMode weight_mode) {
  const int threads = max_threads == 32 ? 128 : max_threads;
  const int by_registers =
      kRegistersOfMultiprocessor / registers_for<T>(packs, max_threads, residual, weight_mode) / threads;
  const int by_threads = kThreadsOfMultiprocessor / threads;
  return by_registers < by_threads ? by_registers : by_threads;
}

// Which packs of its row a thread of rms_norm_row_in_registers has.
struct ThreadPacks {
  bool row_exists;
  int last;  // pack of the row

  __device__ __forceinline__ int index(int j) const { return static_cast<int>(threadIdx.x + j * blockDim.x); }
  __device__ __forceinline__ bool inside(int j) const { return row_exists && index(j) <= last; }
  // Threads past the end of the row load its last pack again, so that no branch stands between the loads.
  __device__ __forceinline__ int index_to_load(int j) const { return min(index(j), last); }
};

// Adds a pack of the residual to h and its values, rounded.
template <typename T>
__device__ __forceinline__ void add_residual(FullPack& h, float (&values)[kVec<T>], const FullPack& residual) {
  float addend[kVec<T>];
  unpack<T>(addend, residual);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) values[i] += addend[i];
  h = pack<T>(values);
  unpack<T>(values, h);  // what the next layer will read, rounded
}

// Adds a pack's elements to the statistics.
template <typename T, bool kQuantize, int kPacks, WeightMode kWeightMode>
__device__ __forceinline__ void add_pack(RowStatistics<T>& statistics, const float (&values)[kVec<T>], bool inside,
                                         const ThreadWeights<T, kPacks, kWeightMode>& weights, int j) {
  Accumulator<T> sum_of_squares = 0;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) sum_of_squares += static_cast<Accumulator<T>>(values[i]) * values[i];
  statistics.sum_of_squares += inside ? sum_of_squares : Accumulator<T>(0);
  if constexpr (kQuantize) {
    float weight[kVec<T>];
    weights.get(j, weight);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) statistics.largest = fmaxf(statistics.largest, fabsf(values[i] * weight[i]));
  }
}

// Quantizes a thread's packs of h, times `factor`, and writes them.
template <typename T, Output kOutput, int kPacks, WeightMode kWeightMode>
__device__ __forceinline__ void write_quantized(const RmsNormArguments& p, int64_t row, const ThreadPacks& packs,
                                                const FullPack (&h)[kPacks],
                                                const ThreadWeights<T, kPacks, kWeightMode>& weights, float factor) {
  auto* q = at(static_cast<uint8_t*>(p.output), p.output_rows, row);
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    float values[kVec<T>];
    float weight[kVec<T>];
    unpack<T>(values, h[j]);
    weights.get(j, weight);
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) values[i] = values[i] * weight[i] * factor;
    if (packs.inside(j)) store_quantized<kOutput>(q, packs.index(j), values);
  }
}

// Normalises a thread's packs of h, and writes them.
template <typename T, int kPacks, WeightMode kWeightMode>
__device__ __forceinline__ void write_normalized(const RmsNormArguments& p, int64_t row, const ThreadPacks& packs,
                                                 const FullPack (&h)[kPacks],
                                                 const ThreadWeights<T, kPacks, kWeightMode>& weights,
                                                 const ReciprocalRms<T>& rstd) {
  auto* y = reinterpret_cast<FullPack*>(at(static_cast<T*>(p.output), p.output_rows, row));
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    float values[kVec<T>];
    float weight[kVec<T>];
    unpack<T>(values, h[j]);
    weights.get(j, weight);
    if (kWeightMode == WeightMode::kGeneral && (p.options & kRoundBeforeWeight)) {
      rstd.normalize_rounding_twice(values, weight);
    } else {
      rstd.normalize(values, weight);
    }
    if (packs.inside(j)) y[packs.index(j)] = pack<T>(values);
  }
}

// One row in registers, kPacks packs a thread. kMaxThreads == 32: a row for a power of two of a warp's lanes,
// blockDim.y rows a block. Otherwise one row a block, blockDim.x a multiple of 32. A launch has one block for each of
// its rows: a persistent kernel that loads the next row ahead was slower at every size.
template <typename T, int kPacks, int kMaxThreads, bool kResidual, Output kOutput, WeightMode kWeightMode>
__global__ void __launch_bounds__(kMaxThreads == 32 ? 128 : kMaxThreads,
                                  min_blocks<T>(kPacks, kMaxThreads, kResidual, kWeightMode))
    rms_norm_row_in_registers(const __grid_constant__ RmsNormArguments p) {
  constexpr bool kQuantize = kOutput != Output::kSameType;
  constexpr bool kRowInWarp = kMaxThreads == 32;

  trigger_dependent_launch();
  const int64_t wanted_row = kRowInWarp ? static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y : blockIdx.x;
  const bool row_exists = !kRowInWarp || wanted_row < p.rows_in_group;
  const int64_t row = row_exists ? wanted_row : 0;
  const ThreadPacks packs{row_exists, p.length - 1};
  const auto* residual_row =
      reinterpret_cast<const FullPack*>(at(static_cast<const T*>(p.residual), p.residual_rows, row));
  // In a decode step the GEMMs between two normalisations evict the weight and the residual from the L2 cache.
  if (kWeightMode == WeightMode::kPlain && gridDim.x <= kFewRows) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      prefetch_to_l2(static_cast<const FullPack*>(p.weight) + packs.index_to_load(j));
      if constexpr (kResidual) prefetch_to_l2(residual_row + packs.index_to_load(j));
    }
  }
  wait_for_previous_kernel();
  const float static_scale = kQuantize ? load_static_scale(p) : 0.0F;
  FullPack h[kPacks];
  FullPack residual[kResidual ? kPacks : 1];
  ThreadWeights<T, kPacks, kWeightMode> weights;
  const auto* x = reinterpret_cast<const FullPack*>(at(static_cast<const T*>(p.x), p.x_rows, row));
#pragma unroll
  for (int j = 0; j < kPacks; ++j) h[j] = x[packs.index_to_load(j)];
  if constexpr (kResidual) {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) residual[j] = residual_row[packs.index_to_load(j)];
  }
#pragma unroll
  for (int j = 0; j < kPacks; ++j) weights.load(j, packs.index_to_load(j), p);

  RowStatistics<T> statistics;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    float values[kVec<T>];
    unpack<T>(values, h[j]);
    if constexpr (kResidual) {
      add_residual<T>(h[j], values, residual[j]);
      auto* out = reinterpret_cast<FullPack*>(at(static_cast<T*>(p.residual_out), p.residual_out_rows, row));
      if (packs.inside(j)) out[packs.index(j)] = h[j];
    }
    add_pack<T, kQuantize>(statistics, values, packs.inside(j), weights, j);
  }
  if constexpr (kRowInWarp) {
    for (int distance = blockDim.x / 2; distance > 0; distance /= 2) statistics.template add_lane<kQuantize>(distance);
  } else {
    reduce_over_block<T, kQuantize, kMaxThreads>(statistics);
  }
  const ReciprocalRms<T> rstd(statistics.sum_of_squares, p);

  if constexpr (kQuantize) {
    const float factor = quantization_factor<kOutput>(p, static_scale, rstd.value, statistics.largest, row,
                                                      threadIdx.x == 0 && row_exists);
    write_quantized<T, kOutput>(p, row, packs, h, weights, factor);
  } else {
    write_normalized<T>(p, row, packs, h, weights, rstd);
  }
}

// Elements of a row as rms_norm_long_row loads and stores them, and the weights for them.
template <typename T, int kWidth>
struct LongRow {
  using Elements = Span<T, kWidth>;

  static __device__ __forceinline__ void get_weight(const RmsNormArguments& p, int64_t i, float (&weight)[kWidth]) {
    Elements::load_either(weight, p.weight, i, p.options & kFloat32Weight);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[k] += p.weight_offset;
    if (p.smoothing == nullptr) return;
    float smoothing[kWidth];
    Elements::load_either(smoothing, p.smoothing, i, p.options & kFloat32Smoothing);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) weight[k] /= smoothing[k];
  }

  // Normalises this thread's elements of `source`, quantizes them times `factor` where the output is codes, and writes
  // them.
  template <Output kOutput>
  static __device__ __forceinline__ void write(const RmsNormArguments& p, int64_t row, const T* source,
                                               const ReciprocalRms<T>& rstd, float factor) {
    for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
      float values[kWidth];
      float weight[kWidth];
      Elements::load(values, source, i);
      get_weight(p, i, weight);
      if constexpr (kOutput != Output::kSameType) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values[k] = values[k] * weight[k] * factor;
        store_quantized<kOutput>(at(static_cast<uint8_t*>(p.output), p.output_rows, row), i, values);
      } else {
        if (p.options & kRoundBeforeWeight) {
          rstd.normalize_rounding_twice(values, weight);
        } else {
          rstd.normalize(values, weight);
        }
        Elements::store(at(static_cast<T*>(p.output), p.output_rows, row), i, values);
      }
    }
  }
};

// For rows that are too long for registers, or whose length or alignment does not allow packs (kPacked is false: single
// elements). Between the two passes the row is kept in shared memory where it fits (kCacheRow), else it is read again.
template <typename T, bool kPacked, Output kOutput>
__global__ void __launch_bounds__(1024) rms_norm_long_row(const __grid_constant__ RmsNormArguments p) {
  constexpr bool kQuantize = kOutput != Output::kSameType;
  constexpr int kWidth = kPacked ? kVec<T> : 1;
  using Row = LongRow<T, kWidth>;
  using Elements = typename Row::Elements;
  extern __shared__ uint4 row_cache[];

  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const bool has_residual = p.residual != nullptr;
  const T* x = at(static_cast<const T*>(p.x), p.x_rows, row);
  const T* residual = at(static_cast<const T*>(p.residual), p.residual_rows, row);
  T* residual_out = at(static_cast<T*>(p.residual_out), p.residual_out_rows, row);
  const bool caches_row = p.options & kCacheRow;
  // What the second pass reads: every thread reads back only what it wrote itself.
  const T* second_source = caches_row ? reinterpret_cast<const T*>(row_cache) : has_residual ? residual_out : x;

  RowStatistics<T> statistics;
  for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
    float values[kWidth];
    Elements::load(values, x, i);
    if (has_residual) {
      float addend[kWidth];
      Elements::load(addend, residual, i);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) values[k] = to_float(from_float<T>(values[k] + addend[k]));
      Elements::store(residual_out, i, values);
    }
    if (caches_row) Elements::store(reinterpret_cast<T*>(row_cache), i, values);
    float weight[kWidth];
    if (kQuantize) Row::get_weight(p, i, weight);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      statistics.sum_of_squares += static_cast<Accumulator<T>>(values[k]) * values[k];
      if (kQuantize) statistics.largest = fmaxf(statistics.largest, fabsf(values[k] * weight[k]));
    }
  }
  reduce_over_block<T, kQuantize, 1024>(statistics);
  const ReciprocalRms<T> rstd(statistics.sum_of_squares, p);
  float factor = 0.0F;
  if constexpr (kQuantize) {
    factor =
        quantization_factor<kOutput>(p, load_static_scale(p), rstd.value, statistics.largest, row, threadIdx.x == 0);
  }
  Row::template write<kOutput>(p, row, second_source, rstd, factor);
}

}  // namespace qwen_plugins
