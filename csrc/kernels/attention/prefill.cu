#include <limits>

#include "heads.cuh"
#include "kernels/common/arithmetic.h"
#include "kernels/common/launch.h"
#include "kernels/common/programmatic_launch.cuh"
#include "prefill.h"
#include "prefill_hopper.h"
#include "prefill_tiles.cuh"

namespace qwen_plugins {
namespace {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareHeads = 4;
constexpr int kPrepareBlocks = 4;  // resident on a multiprocessor: while some wait for their loads, others issue theirs
constexpr int kPlainWarps = 4;

// The sequence that a packed token is in: the number of sequences that end at or before it. Each lane looks at one end
// at a time.
__device__ __forceinline__ int sequence_of(const int32_t* cu_seqlens, int sequences, int64_t token) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0;; first += 32) {
    const int index = first + lane;
    const bool ended = index < sequences && cu_seqlens[index + 1] <= token;
    const unsigned votes = __ballot_sync(0xffffffffU, ended);
    if (votes != 0xffffffffU) return first + __popc(votes);
  }
}

// Likewise where each group of kLanes lanes has a token of its own.
template <int kLanes>
__device__ __forceinline__ int sequence_of_group(const PrefillAttentionParams& p, int64_t token) {
  int sequence = 0;
#pragma unroll
  for (int first = 0; first < 32; first += kLanes) {
    const int found = sequence_of(p.cu_seqlens, p.sequences, __shfl_sync(0xffffffffU, token, first));
    if (static_cast<int>(threadIdx.x) % 32 / kLanes == first / kLanes) sequence = found;
  }
  return sequence;
}

template <typename T>
__device__ __forceinline__ Vector<T> load_vector(const T* from, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vector<T>*>(from);
  float values[kVecSize];
#pragma unroll
  for (int i = 0; i < kVecSize; ++i) values[i] = to_float(from[i]);
  return from_floats<T>(values);
}

// Where a packed token is, and its row of the rotary table.
struct Token {
  bool exists;
  int sequence;
  int position;
  int page;
  int rotary_row;

  // `exists` is false for padding, whose sequence is p.sequences.
  __device__ __forceinline__ Token(const PrefillAttentionParams& p, int64_t index, int its_sequence)
      : exists(its_sequence < p.sequences), sequence(its_sequence), position(0), page(0), rotary_row(0) {
    if (!exists) return;
    position = past_length(p, sequence) + static_cast<int>(index) - p.cu_seqlens[sequence];
    rotary_row = rotary_offset(p.heads, sequence) + position;
    page = page_of(p.cache, sequence, position);
  }
};

// Normalises, rotates and scales the elements that a lane has of every head of a token.
template <typename T, int kHeadSize>
class LaneOfHeads {
 public:
  static constexpr int kLanes = kHeadLanes<kHeadSize>;

  // Loads what does not depend on the head. `scratch` [kHeadSize] is shared memory for this group of lanes.
  __device__ __forceinline__ LaneOfHeads(const AttentionHeads& heads, int rotary_row, T* scratch)
      : heads_(heads), scratch_(scratch), rotary_row_(rotary_row) {
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) cosines_[i] = 1.0F;
    const float* const cosines = heads.rotary_table + rotary_row * int64_t{heads.rotary_dim};
    const float* const sines = cosines + heads.rotary_dim / 2;
    if (element() >= heads.rotary_dim) return;
    if (partners_are_vectors() && reinterpret_cast<uintptr_t>(heads.rotary_table) % sizeof(float4) == 0) {
      const RotaryPair pair(heads.rotary_style, element(), heads.rotary_dim);
#pragma unroll
      for (int i = 0; i < kVecSize; i += 4) {
        const float4 cosine = *reinterpret_cast<const float4*>(cosines + pair.index + i);
        const float4 sine = *reinterpret_cast<const float4*>(sines + pair.index + i);
        cosines_[i] = cosine.x, cosines_[i + 1] = cosine.y, cosines_[i + 2] = cosine.z, cosines_[i + 3] = cosine.w;
        sines_[i] = sine.x, sines_[i + 1] = sine.y, sines_[i + 2] = sine.z, sines_[i + 3] = sine.w;
      }
#pragma unroll
      for (float& sine : sines_) sine *= pair.sign;
      return;
    }
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      if (element() + i >= heads.rotary_dim) continue;
      const RotaryPair pair(heads.rotary_style, element() + i, heads.rotary_dim);
      cosines_[i] = cosines[pair.index];
      sines_[i] = pair.sign * sines[pair.index];
    }
  }

  static __device__ __forceinline__ int element() { return static_cast<int>(threadIdx.x) % kLanes * kVecSize; }
  static __device__ __forceinline__ bool in_head() { return element() < kHeadSize; }

  // Returns x normalised, rotated and, for a query, scaled; all lanes of a warp call it together.
  __device__ __forceinline__ Vector<T> prepare(Vector<T> x, bool is_query) const {
    float values[kVecSize];
    if (heads_.q_norm_weight != nullptr) {
      x = normalise(x, static_cast<const T*>(is_query ? heads_.q_norm_weight : heads_.k_norm_weight));
    }
    to_floats<T>(values, x);
    if (heads_.rotary_dim > 0) rotate(values, x);
    if (is_query && heads_.query_scale != nullptr) {
      const float factor = heads_.query_scale[rotary_row_];
#pragma unroll
      for (float& value : values) value *= factor;
    }
    return from_floats<T>(values);
  }

 private:
  // Whether the partners (RotaryPair) of a lane's elements are exactly the elements of one other lane.
  __device__ __forceinline__ bool partners_are_vectors() const {
    return heads_.rotary_style == RotaryStyle::kNeox && heads_.rotary_dim / 2 % kVecSize == 0;
  }

  __device__ __forceinline__ Vector<T> normalise(const Vector<T>& x, const T* weight) const {
    float values[kVecSize];
    to_floats<T>(values, x);
    float sum_of_squares = 0.0F;
#pragma unroll
    for (const float value : values) sum_of_squares += value * value;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum_of_squares += __shfl_xor_sync(0xffffffffU, sum_of_squares, offset);
    }
    const float factor = rsqrtf(sum_of_squares / kHeadSize + heads_.norm_eps);
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      values[i] = in_head() ? values[i] * factor * to_float(weight[element() + i]) : 0.0F;
    }
    return from_floats<T>(values);
  }

  __device__ __forceinline__ void rotate(float (&values)[kVecSize], const Vector<T>& x) const {
    float others[kVecSize];
    to_floats<T>(others, partners_are_vectors() ? vector_of_partner(x) : gathered_partners(x));
    if (element() >= heads_.rotary_dim) return;
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) values[i] = values[i] * cosines_[i] + others[i] * sines_[i];
  }

  __device__ __forceinline__ Vector<T> vector_of_partner(const Vector<T>& x) const {
    const int distance = heads_.rotary_dim / 2 / kVecSize;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int partner = element() < heads_.rotary_dim / 2 ? lane + distance : lane - distance;
    Vector<T> others;
#pragma unroll
    for (int i = 0; i < kVecSize / kVec<T>; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        others.packs[i].words[j] = __shfl_sync(0xffffffffU, x.packs[i].words[j], partner);
      }
    return others;
  }

  // The partners of a lane's elements one by one, through shared memory.
  __device__ __forceinline__ Vector<T> gathered_partners(const Vector<T>& x) const {
    if (in_head()) *reinterpret_cast<Vector<T>*>(scratch_ + element()) = x;
    __syncwarp();
    float others[kVecSize] = {};
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) {
      const RotaryPair pair(heads_.rotary_style, element() + i, heads_.rotary_dim);
      if (element() + i < heads_.rotary_dim) others[i] = to_float(scratch_[pair.partner]);
    }
    __syncwarp();
    return from_floats<T>(others);
  }

  const AttentionHeads& heads_;
  T* scratch_;
  int rotary_row_;
  float cosines_[kVecSize];
  float sines_[kVecSize] = {};
};

// Writes a lane's elements of a key or value to the cache, if it `writes`; all lanes of a warp call it together. `to`
// and, in a cache of 8 bits, `scale_to` are where they belong.
template <typename T, int kHeadSize, bool kQuantized>
__device__ __forceinline__ void write_to_cache(const Vector<T>& vector, CacheDataType dtype, char* to, float* scale_to,
                                               bool writes) {
  const int element = LaneOfHeads<T, kHeadSize>::element();
  if constexpr (kQuantized) {
    float values[kVecSize];
    to_floats<T>(values, vector);
    float largest = 0.0F;
#pragma unroll
    for (const float value : values) largest = larger_magnitude(largest, value);
#pragma unroll
    for (int offset = kHeadLanes<kHeadSize> / 2; offset > 0; offset /= 2) {
      largest = larger_magnitude(largest, __shfl_xor_sync(0xffffffffU, largest, offset));
    }
    if (!writes) return;
    const float scale = cache_scale(largest, dtype);
    const CodeOf code(scale, dtype);
    Pack<2> codes = {};
#pragma unroll
    for (int i = 0; i < kVecSize; ++i) codes.words[i / 4] |= code(values[i]) << 8 * (i % 4);
    *reinterpret_cast<Pack<2>*>(to + element) = codes;
    if (element == 0) *scale_to = scale;
  } else if (writes) {
    *reinterpret_cast<Vector<T>*>(to + element * static_cast<int>(sizeof(T))) = vector;
  }
}

// Blocks for the heads of q, k and v of the same tokens.
__host__ __device__ inline unsigned parts_of_heads(const AttentionHeads& heads) {
  return divide_up(static_cast<unsigned>(heads.num_heads + 2 * heads.num_kv_heads), kPrepareHeads);
}

// A block has some tokens, one for each group of lanes, and kPrepareHeads heads of q, k or v of each, so that it reads
// and writes long contiguous pieces of both qkv and the cache. All loads are issued before the first is used. The last
// blocks have the first tokens: attention begins with those, and finds some of them in the L2 cache.
template <typename T, int kHeadSize, bool kQuantized>
__global__ void __launch_bounds__(kPrepareThreads, std::is_same_v<T, float> ? 1 : kPrepareBlocks - kQuantized)
    prepare_tokens(const __grid_constant__ PrefillArguments a) {
  const PrefillAttentionParams& p = a.params;
  using Lane = LaneOfHeads<T, kHeadSize>;
  __shared__ __align__(16) T scratch[kPrepareThreads / Lane::kLanes][kHeadSize];
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int group = static_cast<int>(threadIdx.x) / Lane::kLanes;
  const unsigned parts = parts_of_heads(p.heads);
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int64_t first_token = int64_t{block / parts} * (kPrepareThreads / Lane::kLanes);
  const int64_t token = min(first_token + group, p.tokens - 1);
  bool writes = first_token + group < p.tokens && Lane::in_head();
  const int first_head = static_cast<int>(block % parts) * kPrepareHeads;
  const int first_k = p.heads.num_heads;
  const int first_v = first_k + p.heads.num_kv_heads;
  const int end = min(first_head + kPrepareHeads, first_v + p.heads.num_kv_heads);
  const T* const qkv = static_cast<const T*>(p.qkv) + token * p.qkv_row_stride + Lane::element();
  const bool aligned = reinterpret_cast<uintptr_t>(p.qkv) % sizeof(FullPack) == 0 &&
                       p.qkv_row_stride * int64_t{sizeof(T)} % int64_t{sizeof(FullPack)} == 0;
  Vector<T> vectors[kPrepareHeads];
#pragma unroll
  for (int i = 0; i < kPrepareHeads; ++i) {
    vectors[i] = {};
    if (first_head + i < end && writes) vectors[i] = load_vector(qkv + (first_head + i) * kHeadSize, aligned);
  }
  const Token place(p, token, sequence_of_group<Lane::kLanes>(p, token));
  writes = writes && place.exists;
  const Lane lane(p.heads, place.rotary_row, scratch[group]);
  T* const queries = static_cast<T*>(p.queries) + token * p.heads.num_heads * kHeadSize + Lane::element();
  const HeadCacheOf<T, kHeadSize, kQuantized> cache(p.cache, a.layout, place.sequence, 0);
  char* const first_key = cache.key(place.page, place.position);
  float* first_scale = nullptr;
  if constexpr (kQuantized) first_scale = cache.key_scale(place.page, place.position);
#pragma unroll
  for (int i = 0; i < kPrepareHeads; ++i) {
    const int head = first_head + i;
    if (head >= end) break;
    if (head < first_v) vectors[i] = lane.prepare(vectors[i], head < first_k);
    if (head >= first_k) {
      const int64_t offset =
          head < first_v ? (head - first_k) * a.layout.block : a.layout.value + (head - first_v) * a.layout.block;
      float* const scale =
          kQuantized ? reinterpret_cast<float*>(reinterpret_cast<char*>(first_scale) + offset) : nullptr;
      write_to_cache<T, kHeadSize, kQuantized>(vectors[i], p.cache.dtype, first_key + offset, scale, writes);
    } else if (writes) {
      *reinterpret_cast<Vector<T>*>(queries + head * kHeadSize) = vectors[i];
    }
  }
}

// Attention without tensor cores, for float32: a warp for each token and head, one key after the other.
template <typename T, int kHeadSize, bool kQuantized>
__global__ void __launch_bounds__(32 * kPlainWarps) attend_plainly(const __grid_constant__ PrefillArguments a) {
  const PrefillAttentionParams& p = a.params;
  constexpr int kPerLane = (kHeadSize + 31) / 32;
  trigger_dependent_launch();
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y * kPlainWarps + threadIdx.x / 32);
  if (head >= p.heads.num_heads) return;
  const int64_t token = blockIdx.x;
  const Token place(p, token, sequence_of(p.cu_seqlens, p.sequences, token));
  if (!place.exists) return;
  const int kv_head = head / (p.heads.num_heads / p.heads.num_kv_heads);
  const HeadCacheOf<T, kHeadSize, kQuantized> cache(p.cache, a.layout, place.sequence, kv_head);
  const auto read = [&](const char* head, const float* scale, int d) {
    if constexpr (!kQuantized) return to_float(reinterpret_cast<const T*>(head)[d]);
    float values[4];
    codes_to_floats(values, static_cast<unsigned char>(head[d]), p.cache.dtype);
    return values[0] * *scale;
  };
  const int64_t first = (token * p.heads.num_heads + head) * kHeadSize;
  const T* const query = static_cast<const T*>(p.queries) + first;
  float q[kPerLane] = {};
  float result[kPerLane] = {};
  for (int i = 0; i < kPerLane; ++i) {
    if (lane + 32 * i < kHeadSize) q[i] = to_float(query[lane + 32 * i]) * p.softmax_scale;
  }
  float maximum = -INFINITY;
  float sum = 0.0F;
  for (int position = 0; position <= place.position; ++position) {
    const int page = page_of(p.cache, place.sequence, position);
    const char* const key = cache.key(page, position);
    const float* scales[2] = {};
    if constexpr (kQuantized) {
      scales[0] = cache.key_scale(page, position);
      scales[1] = cache.value_scale(page, position);
    }
    float score = 0.0F;
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i < kHeadSize) score += q[i] * read(key, scales[0], lane + 32 * i);
    }
    score = sum_over_warp(score);
    const float new_maximum = fmaxf(maximum, score);
    const float factor = expf(maximum - new_maximum);
    const float weight = expf(score - new_maximum);
    maximum = new_maximum;
    sum = sum * factor + weight;
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i >= kHeadSize) continue;
      result[i] = result[i] * factor + weight * read(key + a.layout.value, scales[1], lane + 32 * i);
    }
  }
  for (int i = 0; i < kPerLane; ++i) {
    const int64_t place = first + lane + 32 * i;
    if (lane + 32 * i >= kHeadSize) continue;
    if (p.context_scale == nullptr) {
      static_cast<T*>(p.context)[place] = from_float<T>(result[i] / sum);
    } else {
      const float scaled[1] = {result[i] / sum * finite_reciprocal(*p.context_scale)};
      store_context_codes(static_cast<uint8_t*>(p.context) + place, scaled, p.context_dtype);
    }
  }
}

template <typename T, typename Shape, bool kQuantized>
cudaError_t launch_tiles(const PrefillArguments& a, const DeviceProperties& device, cudaStream_t stream) {
  const PrefillAttentionParams& p = a.params;
  auto* const kernel = attend_tile<T, Shape, kQuantized>;
  constexpr int kSharedBytes = Shape::kSharedElements * static_cast<int>(sizeof(T));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  // The most tiles that so many tokens of so many sequences can have.
  const int64_t tiles = (p.tokens + int64_t{p.sequences} * (Shape::kRows - 1)) / Shape::kRows;
  // Heads in x: the longest tiles of all heads come first.
  const dim3 blocks(static_cast<unsigned>(p.heads.num_heads), static_cast<unsigned>(tiles));
  return launch_kernel(kernel, blocks, dim3(Shape::kThreads), kSharedBytes, device, stream, a);
}

template <typename T, int kHeadSize, bool kQuantized>
cudaError_t launch(const PrefillAttentionParams& p, const DeviceProperties& device, cudaStream_t stream) {
  const PrefillArguments a{p, HeadCacheOf<T, kHeadSize, kQuantized>::layout_of(p.heads, p.cache)};
  constexpr int kTokens = kPrepareThreads / kHeadLanes<kHeadSize>;
  const auto groups = static_cast<unsigned>(divide_up(p.tokens, kTokens));
  const dim3 parts(groups * parts_of_heads(p.heads));
  const cudaError_t error =
      launch_kernel(prepare_tokens<T, kHeadSize, kQuantized>, parts, dim3(kPrepareThreads), 0, device, stream, a);
  if (error != cudaSuccess) return error;
  if constexpr (std::is_same_v<T, float>) {
    auto* const kernel = attend_plainly<T, kHeadSize, kQuantized>;
    const dim3 blocks(static_cast<unsigned>(p.tokens),
                      static_cast<unsigned>(divide_up(p.heads.num_heads, kPlainWarps)));
    return launch_kernel(kernel, blocks, dim3(32 * kPlainWarps), 0, device, stream, a);
  } else {
#ifdef QWEN_PLUGINS_HOPPER
    if (takes_prefill_hopper(p.heads, device)) return launch_prefill_hopper(a, device, stream);
#endif
    return launch_tiles<T, TileShape<kHeadSize, kHeadSize <= 128 ? 2 : 1>, kQuantized>(a, device, stream);
  }
}

}  // namespace

cudaError_t launch_prefill_attention(const PrefillAttentionParams& given, cudaStream_t stream) {
  PrefillAttentionParams p = given;
  const int64_t columns = int64_t{p.heads.num_heads + 2 * p.heads.num_kv_heads} * p.heads.head_size;
  if (!is_valid(p.heads, p.cache) || (p.qkv_row_stride < columns && p.tokens > 1) || p.tokens < 0 ||
      p.tokens > kMaxPrefillTokens || p.sequences < 0 || p.sequences > kMaxPrefillSequences) {
    return cudaErrorInvalidValue;
  }
  if (p.tokens == 0) return cudaSuccess;
  if (p.qkv == nullptr || p.context == nullptr || p.cu_seqlens == nullptr || p.sequences == 0 ||
      reinterpret_cast<uintptr_t>(p.context) % sizeof(FullPack) != 0) {
    return cudaErrorInvalidValue;
  }
  if (p.context_scale != nullptr && (!is_context_code(p.context_dtype) || p.queries == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (p.queries == nullptr) p.queries = p.context;
  if (reinterpret_cast<uintptr_t>(p.queries) % sizeof(FullPack) != 0) return cudaErrorInvalidValue;
  DeviceProperties device;
  if (const cudaError_t error = current_device_properties(device); error != cudaSuccess) return error;
  return with_type_and_head_size(p.heads, [&](auto type, auto head_size) {
    if (p.cache.dtype == CacheDataType::kSame) {
      return launch<decltype(type), head_size.value, false>(p, device, stream);
    }
    return launch<decltype(type), head_size.value, true>(p, device, stream);
  });
}

}  // namespace qwen_plugins
