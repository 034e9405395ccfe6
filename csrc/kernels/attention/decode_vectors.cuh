// Decode attention for one query head, without tensor cores: a group of lanes processes one position at a time, each
// lane eight elements of it.
#pragma once

#include <climits>

#include "decode_work.cuh"

namespace qwen_plugins::decoding {

// Online softmax of one lane.
struct SoftmaxState : Partial {
  float values[kVecSize] = {};

  __device__ __forceinline__ void rescale(float new_maximum) {
    const float factor = exp2_approximately(maximum - new_maximum);
    maximum = new_maximum;
    sum *= factor;
#pragma unroll
    for (float& value : values) value *= factor;
  }
};

// One warp's pass over its positions.
template <typename T, int kHeadSize>
class VectorAttention {
 public:
  static constexpr int kHeads = 1;
  static constexpr int kWarps = 16;
  static constexpr bool kInClusters = false;
  static constexpr bool kQuantized = false;
  struct SharedMemory : SharedInputs<kHeadSize, kHeads> {
    alignas(16) float warp_values[kWarps][kHeadSize];
    float2 warp_partials[kWarps];  // maximum and sum

    __device__ __forceinline__ float* values(int warp, int) { return warp_values[warp]; }
    __device__ __forceinline__ float2& partial(int warp, int) { return warp_partials[warp]; }
  };
  static constexpr int shared_bytes(int) { return static_cast<int>(sizeof(SharedMemory)); }

  // Warps with a partial result, and the warp that prepares the first head.
  static __device__ __forceinline__ int num_partials() { return num_warps(); }
  static __device__ __forceinline__ int first_preparing_warp() { return 0; }

  static __device__ __forceinline__ void pack_query(SharedMemory&, int) {}  // float32 queries are used as they are
  static __device__ __forceinline__ void clear_other_queries(SharedMemory&, int) {}

  __device__ __forceinline__ VectorAttention(const Arguments& a, const Work& work, SharedMemory&)
      : begin_(work.begin + warp() * kStep),
        end_(work.end),
        stride_(num_warps() * kStep),
        cache_(a.params.cache, a.layout, work.sequence, work.kv_head),
        pages_(work.pages),
        rows_{cache_.row(0, 0), cache_.row(0, 0)} {
    find_pages(begin_);
    for_positions(begin_, 0, [&](int u, const char* from) {
      load(key_vectors_[u], u, from);
      load(value_vectors_[u], u, from + cache_.value_bytes());
    });
    find_pages(begin_ + stride_);
  }

  __device__ __forceinline__ void attend(const DecodeAttentionParams&, const Work& work, float scale,
                                         const SharedMemory& shared) {
    read_shared(work, scale, shared);
    for (int start = begin_; start < end_; start += stride_) {
      float scores[kUnroll];
      float maximum = state_.maximum;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float key[kVecSize];
        to_floats<T>(key, key_vectors_[u]);
        const float score = dot(key);
        scores[u] = start + u * kGroups + group() < end_ ? score : -INFINITY;
        maximum = fmaxf(maximum, scores[u]);
      }
      const int next = start + stride_;
      if (next < end_) load_once(key_vectors_, 0, next);
      state_.rescale(maximum);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float value[kVecSize];
        to_floats<T>(value, value_vectors_[u]);
        const float weight = exp2_approximately(scores[u] - maximum);
        state_.sum += weight;
#pragma unroll
        for (int j = 0; j < kVecSize; ++j) state_.values[j] += weight * value[j];
      }
      if (next < end_) load_once(value_vectors_, cache_.value_bytes(), next);
      find_pages(next + stride_);
    }
  }

  // Combines the results of the warp's groups and writes them to shared memory.
  __device__ __forceinline__ void write(SharedMemory& shared) {
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      state_.rescale(fmaxf(state_.maximum, __shfl_xor_sync(0xffffffffU, state_.maximum, offset)));
      state_.sum += __shfl_xor_sync(0xffffffffU, state_.sum, offset);
#pragma unroll
      for (float& value : state_.values) value += __shfl_xor_sync(0xffffffffU, value, offset);
    }
    if (lane() == 0) shared.partial(warp(), 0) = make_float2(state_.maximum, state_.sum);
    if (group() == 0 && in_head()) {
      auto* const to = reinterpret_cast<float4*>(shared.values(warp(), 0) + element());
      const float (&values)[kVecSize] = state_.values;
      to[0] = make_float4(values[0], values[1], values[2], values[3]);
      to[1] = make_float4(values[4], values[5], values[6], values[7]);
    }
  }

 private:
  static constexpr int kLanes = kHeadLanes<kHeadSize>;
  static constexpr int kGroups = 32 / kLanes;
  // Registers for keys and values in flight: all that are left, and enough for short sequences to take one step.
  static constexpr int kRegisters = kHeadSize <= 128 ? 48 : 32;
  static constexpr int kVectorRegisters = kVecSize * static_cast<int>(sizeof(T)) / 4;
  static constexpr int kUnroll = kRegisters / (2 * kVectorRegisters);  // positions of a group in a step
  static constexpr int kStep = kGroups * kUnroll;                      // positions of a warp in a step

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int num_warps() { return static_cast<int>(blockDim.x) / 32; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int group() { return lane() / kLanes; }
  static __device__ __forceinline__ int element() { return lane() % kLanes * kVecSize; }
  static __device__ __forceinline__ bool in_head() { return element() < kHeadSize; }

  __device__ __forceinline__ float dot(const float (&key)[kVecSize]) const {
    float score = 0.0F;
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) score += q_[j] * key[j];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(0xffffffffU, score, offset);
    return score;
  }

  // Finds where a step's positions are: a step is shorter than a page, and most are in one. What is in the next page
  // has an address of its own.
  __device__ __forceinline__ void find_pages(int start) {
    static_assert(kStep <= kPageSize);
    if (!pages_.exist() || start >= end_) return;
    rows_[0] = cache_.row(pages_(start), start);
    page_end_ = static_cast<int>((static_cast<unsigned>(start) / kPageSize + 1) * kPageSize);
    if (page_end_ < min(start + kStep, end_)) rows_[1] = cache_.row(pages_(page_end_), page_end_);
  }
  // Calls `load(u, from)` with the address of each of the group's positions in a step: keys, or values with `offset`.
  template <typename Load>
  __device__ __forceinline__ void for_positions(int start, int64_t offset, const Load& load) const {
    constexpr int kTokenBytes = kHeadSize * static_cast<int>(sizeof(T));
    const int64_t first = (start + group()) * int64_t{kTokenBytes} + element() * static_cast<int>(sizeof(T)) + offset;
    if (start + kStep <= page_end_) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) load(u, rows_[0] + first + u * kGroups * kTokenBytes);
    } else {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const char* const row = start + u * kGroups + group() < page_end_ ? rows_[0] : rows_[1];
        load(u, row + first + u * kGroups * kTokenBytes);
      }
    }
  }

  // Loads a position of the first step.
  __device__ __forceinline__ void load(Vector<T>& vector, int u, const char* from) const {
    vector = {};
    if (in_head() && begin_ + u * kGroups + group() < end_) vector = *reinterpret_cast<const Vector<T>*>(from);
  }

  // Loads the keys, or with `offset` the values, of a later step: with the streaming cache hint (.cs), since the cache
  // is read once, and as single predicated instructions. With the code that the compiler generates for load(), short
  // sequences, which need no second step, take 0.5 us longer (measured).
  __device__ __forceinline__ void load_once(Vector<T> (&vectors)[kUnroll], int64_t offset, int start) const {
    const int end = in_head() ? end_ : 0;
    for_positions(start, offset, [&](int u, const char* from) {
      const auto* const packs = reinterpret_cast<const FullPack*>(from);
#pragma unroll
      for (int i = 0; i < kVecSize / kVec<T>; ++i) {
        uint32_t (&words)[4] = vectors[u].packs[i].words;
        asm volatile(
            "{\n.reg .pred exists;\nsetp.lt.s32 exists, %5, %6;\n"
            "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
            "@exists ld.global.cs.v4.b32 {%0,%1,%2,%3}, [%4];\n}"
            : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
            : "l"(packs + i), "r"(start + u * kGroups + group()), "r"(end));
      }
    });
  }

  // Reads q, and in the last warp's first group begins the softmax with the new token.
  __device__ __forceinline__ void read_shared(const Work& work, float scale, const SharedMemory& shared) {
    if (in_head()) load_shared(q_, shared.queries[0] + element());
#pragma unroll
    for (float& element : q_) element *= scale;
    if (!work.has_new_token || warp() != num_warps() - 1) return;
    float key[kVecSize] = {};
    float value[kVecSize] = {};
    if (in_head()) {
      load_shared(key, shared.new_key + element());
      load_shared(value, shared.new_value + element());
    }
    const float score = dot(key);
    if (group() != 0) return;
    state_.maximum = score;
    state_.sum = 1.0F;
#pragma unroll
    for (int j = 0; j < kVecSize; ++j) state_.values[j] = value[j];
  }

  int begin_;
  int end_;
  int stride_;
  HeadCacheOf<T, kHeadSize, false> cache_;
  PageNumbers pages_;
  // What a position's bytes are added to, for the next step's positions below page_end_ and for the others.
  const char* rows_[2];
  int page_end_ = INT_MAX;
  Vector<T> key_vectors_[kUnroll];
  Vector<T> value_vectors_[kUnroll];
  float q_[kVecSize] = {};
  SoftmaxState state_;
};

}  // namespace qwen_plugins::decoding
