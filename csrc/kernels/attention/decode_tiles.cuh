// Decode attention for up to eight query heads that share a key-value head, on tensor cores (mma.m16n8k16): scores^T =
// K · q^T has a row for each position and a column for each head; context^T = V^T · P^T a row for each element of the
// values and a column for each head.
//
// Half of a block's warps read the cache, each its own tiles; the others prepare q meanwhile. Keys and
// values go from shared memory to registers with 16-byte loads and are not rearranged there: a row, column or k index
// of an mma may stand for any element, as long as both operands agree. Only the probabilities are rearranged between
// the two matrix multiplies, 8 x 8 of them with one movmatrix.
//
// With a cache of 8 bits codes are multiplied, converted to float16 in registers, which is exact: the scales of keys
// are factors of the scores, those of values of the probabilities. What is subtracted from the scores is then the
// maximum of score + log2(scale of the value), so that the products of probabilities and scales are in float16's range.
#pragma once

#include "decode_cluster.cuh"
#include "decode_stream.cuh"
#include "decode_work.cuh"

namespace qwen_plugins::decoding {

template <typename T, int kHeadSize, bool kQuantized_>
class TileAttention {
 public:
  static constexpr bool kQuantized = kQuantized_;
  using Operand = std::conditional_t<kQuantized, __half, T>;  // of mma
  using Stream = CacheStream<T, kHeadSize, kQuantized>;
  static constexpr int kHeads = 8;
  static constexpr int kVectors = kHeadSize / kVecSize;  // of a query
  static constexpr int kWarps = kHeadSize > 128 ? 8 : 16;
  static constexpr bool kInClusters = true;
  static constexpr int kReaders = kWarps / 2;  // warps of a large block that read the cache

  struct SharedMemory : SharedInputs<kHeadSize, kHeads> {
    FullPack packed_queries[kHeads][kVectors];
    Inbox<kHeadSize> inbox;
    typename Stream::Barriers barriers[kReaders];
    float2 warp_partials[kReaders][kHeads];  // maximum and sum
    typename Stream::Tiles tiles[kReaders];  // a small block has fewer

    // A warp's result overwrites its tiles.
    __device__ __forceinline__ float* values(int warp, int head) {
      static_assert(sizeof(tiles[0]) >= kHeads * kHeadSize * sizeof(float));
      return reinterpret_cast<float*>(&tiles[warp]) + head * kHeadSize;
    }
    __device__ __forceinline__ float2& partial(int warp, int head) { return warp_partials[warp][head]; }
  };
  static constexpr int shared_bytes(int warps) {
    return static_cast<int>(sizeof(SharedMemory) - (kReaders - warps / 2) * sizeof(typename Stream::Tiles));
  }

  // Warps with a partial result, and the warp that prepares the first head.
  static __device__ __forceinline__ int num_partials() { return num_readers(); }
  static __device__ __forceinline__ int first_preparing_warp() { return num_readers(); }

  // Converts a query to operands; called by the warp that has prepared it.
  static __device__ __forceinline__ void pack_query(SharedMemory& shared, int head) {
    const int i = static_cast<int>(threadIdx.x) % 32;
    if (i < kVectors) read_vector(shared.packed_queries[head][i], shared.queries[head] + i * kVecSize);
  }

  // Sets the queries of heads that do not exist to zero: their scores, too, decide when the maxima are raised.
  static __device__ __forceinline__ void clear_other_queries(SharedMemory& shared, int num_heads) {
    for (int i = num_heads * kVectors + static_cast<int>(threadIdx.x); i < kHeads * kVectors; i += blockDim.x) {
      shared.packed_queries[i / kVectors][i % kVectors] = {};
    }
  }

  __device__ __forceinline__ TileAttention(const Arguments& a, const Work& work, SharedMemory& shared)
      : end_(work.end),
        stream_(typename Stream::Cache(a.params.cache, a.layout, work.sequence, work.kv_head), work.pages,
                warp() < num_readers() ? work.begin + warp() * kStep : work.end, work.end, num_readers() * kStep,
                shared.tiles[warp() % kReaders], shared.barriers[warp() % kReaders]) {}

  // `scale` includes log2(e): the softmax is computed with exp2.
  __device__ __forceinline__ void attend(const DecodeAttentionParams& p, const Work& work, float scale,
                                         const SharedMemory& shared) {
    if (work.has_new_token && warp() == num_readers() - 1) begin_with_new_token(scale, shared);
    if constexpr (!kQuantized) {
      attend_cached<CacheDataType::kSame>(scale, shared);
    } else if (p.cache.dtype == CacheDataType::kInt8) {
      attend_cached<CacheDataType::kInt8>(scale, shared);
    } else {
      attend_cached<CacheDataType::kFloat8E4M3>(scale, shared);
    }
  }

  __device__ __forceinline__ void write(SharedMemory& shared) {
    if (warp() >= num_readers()) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = 2 * column() + h;
      float sum = sums_[h];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffU, sum, offset);
      if (row() == 0) shared.partial(warp(), head) = make_float2(maxima_[h], sum);
#pragma unroll
      for (int g = 0; g < kValueGroups; ++g) {
        if (value_element(g) >= kHeadSize) continue;
        auto* const to = reinterpret_cast<float4*>(shared.values(warp(), head) + value_element(g));
#pragma unroll
        for (int i = 0; i < kLoad / 4; ++i) {
          const auto& tiles = results_[g];
          to[i] = make_float4(tiles[2 * i][h], tiles[2 * i][2 + h], tiles[2 * i + 1][h], tiles[2 * i + 1][2 + h]);
        }
      }
    }
  }

 private:
  static constexpr int kStep = Stream::kStep;
  static constexpr int kLoad = kQuantized ? 16 : kVecSize;              // elements that a lane loads at once, 16 bytes
  static constexpr int kKeyChunks = divide_up(kHeadSize, 4 * kLoad);    // a quad of lanes loads one of a key
  static constexpr int kKeyVectors = kKeyChunks * (kLoad / kVecSize);   // of a lane
  static constexpr int kValueGroups = divide_up(kHeadSize, 8 * kLoad);  // eight lanes load one of a value
  static constexpr float kLeastScale = 8e-28F;  // of a value, 2^-90, where it is added to scores as a logarithm
  static constexpr float kSlack = 8.0F;         // by how much a scaled score may exceed the maximum that is subtracted

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int num_readers() { return static_cast<int>(blockDim.x) / 64; }
  // A lane's row and column in the fragments of mma_m16n8k16.
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % 4; }

  // The first element of a lane's i-th vector of a key, or of its part of a group of a value.
  static __device__ __forceinline__ int key_element(int i) {
    constexpr int kPerLoad = kLoad / kVecSize;
    return i / kPerLoad * 4 * kLoad + column() * kLoad + i % kPerLoad * kVecSize;
  }
  static __device__ __forceinline__ int value_element(int group) { return (8 * group + row()) * kLoad; }
  // The position in 16 of them of row or k index `i` of a lane: row() and row() + 8, or 2 * column() and so on.
  static __device__ __forceinline__ int row_position(int i) { return row() + 8 * i; }
  static __device__ __forceinline__ int k_position(int i) { return 2 * column() + i % 2 + i / 2 * 8; }

  // 16 bytes of a tile: elements `element` and on of position `position`.
  static __device__ __forceinline__ FullPack load(uint32_t tile, int position, int element) {
    FullPack result;
    const uint32_t from =
        tile + static_cast<uint32_t>(position * Stream::kTokenBytes + element * (Stream::kTokenBytes / kHeadSize));
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result.words[0]), "=r"(result.words[1]), "=r"(result.words[2]), "=r"(result.words[3])
                 : "r"(from)
                 : "memory");
    return result;
  }
  static __device__ __forceinline__ float load_scale(uint32_t tile, int position) {
    float result;
    const uint32_t from = tile + static_cast<uint32_t>(Stream::kScales + position * 4);
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(result) : "r"(from) : "memory");
    return result;
  }

  template <CacheDataType kType>
  __device__ __forceinline__ void attend_cached(float scale, const SharedMemory& shared) {
    for (; !stream_.done(); stream_.advance()) {
      float scores[kStep / 16][4];
      const uint32_t keys = stream_.wait_for(Cached::kKeys);
#pragma unroll
      for (int first = 0; first < kStep; first += 16) {
        compute_scores<kType>(scores[first / 16], keys, first, scale, shared);
      }
      stream_.release(Cached::kKeys);
      const uint32_t values = stream_.wait_for(Cached::kValues);
#pragma unroll
      for (int first = 0; first < kStep; first += 16) {
        if constexpr (kQuantized) {
          add_codes<kType>(scores[first / 16], values, first);
        } else {
          raise_maxima(scores[first / 16]);
          FullPack vectors[4][kValueGroups];
          load_values(vectors, values, first);
          add_values(scores[first / 16], vectors);
        }
      }
      stream_.release(Cached::kValues);
    }
  }

  // The scores of 16 positions of a tile, from `first` on.
  template <CacheDataType kType>
  __device__ __forceinline__ void compute_scores(float (&scores)[4], uint32_t tile, int first, float scale,
                                                 const SharedMemory& shared) const {
    FullPack keys[2][kKeyVectors];
    load_keys<kType>(keys, tile, first);
    multiply_keys(scores, keys, shared);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float factor = scale;
      if constexpr (kQuantized) factor *= load_scale(tile, first + row_position(r));
      const bool exists = stream_.start + first + row_position(r) < end_;
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) scores[i] = exists ? scores[i] * factor : kLowestScore;
    }
  }

  // Loads a lane's vectors of keys row() and row() + 8. Scores of positions from the end on are not used.
  template <CacheDataType kType>
  static __device__ __forceinline__ void load_keys(FullPack (&keys)[2][kKeyVectors], uint32_t tile, int first) {
    constexpr int kPerLoad = kLoad / kVecSize;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) {
        const int element = key_element(c * kPerLoad);
        FullPack loaded = {};
        if (kHeadSize % (4 * kLoad) == 0 || element < kHeadSize) loaded = load(tile, first + row_position(r), element);
        if constexpr (kQuantized) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t pairs[2];
            codes_to_float16<kType>(pairs, loaded.words[i]);
            keys[r][2 * c + i / 2].words[i % 2 * 2] = pairs[0];
            keys[r][2 * c + i / 2].words[i % 2 * 2 + 1] = pairs[1];
          }
        } else {
          keys[r][c] = loaded;
        }
      }
  }

  // Loads a lane's parts of its four values. Positions from the end on are set to zero: what is there may be NaN, which
  // a probability of 0 would not hide.
  __device__ __forceinline__ void load_values(FullPack (&values)[4][kValueGroups], uint32_t tile, int first) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int g = 0; g < kValueGroups; ++g) {
        const int position = first + k_position(i);
        values[i][g] = {};
        if (stream_.start + position < end_ && (kHeadSize % (8 * kLoad) == 0 || value_element(g) < kHeadSize)) {
          values[i][g] = load(tile, position, value_element(g));
        }
      }
  }

  static __device__ __forceinline__ void read_vector(FullPack& vector, const float* from) {
    float elements[kVecSize];
    load_shared(elements, from);
    if constexpr (kQuantized && !std::is_same_v<T, __half>) {
      constexpr float kLargest = 65504.0F;  // of float16
#pragma unroll
      for (float& element : elements) {
        if (fabsf(element) > kLargest) element = copysignf(kLargest, element);  // and NaN stays NaN
      }
    }
    vector = pack<Operand>(elements);
  }

  // The scores of keys row() and row() + 8 for heads 2 * column() and 2 * column() + 1, from two accumulators that do
  // not wait for each other. Queries stay in shared memory; a lane reads those of head row().
  __device__ __forceinline__ void multiply_keys(float (&scores)[4], const FullPack (&keys)[2][kKeyVectors],
                                                const SharedMemory& shared) const {
    float sums[2][4] = {};
#pragma unroll
    for (int v = 0; v < kKeyVectors; ++v) {
      const int element = key_element(v);
      FullPack query = {};
      if (kHeadSize % (4 * kLoad) == 0 || element < kHeadSize) query = shared.packed_queries[row()][element / kVecSize];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t tile[4] = {keys[0][v].words[2 * i], keys[1][v].words[2 * i], keys[0][v].words[2 * i + 1],
                                  keys[1][v].words[2 * i + 1]};
        mma_m16n8k16<Operand>(sums[i], tile, query.words[2 * i], query.words[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = sums[0][i] + sums[1][i];
  }

  // The new token comes first: relative to its score, its probability is 1, or `weight` with a cache of 8 bits.
  __device__ __forceinline__ void begin_with_new_token(float scale, const SharedMemory& shared) {
    FullPack keys[2][kKeyVectors] = {};
#pragma unroll
    for (int v = 0; v < kKeyVectors; ++v) {
      const int element = key_element(v);
      if (row() == 0 && element < kHeadSize) read_vector(keys[0][v], shared.new_key + element);
    }
    float scores[4];
    multiply_keys(scores, keys, shared);
    float weight = 1.0F;  // the probability, whose product with the scale of the value is 1
    float factor = 1.0F;  // of the value
    if constexpr (kQuantized) {
      scale *= shared.new_scales[0];
      weight = __fdividef(1.0F, fmaxf(shared.new_scales[1], kLeastScale));
      factor += 0.0F * shared.new_scales[1];  // NaN stays NaN
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maxima_[h] = __shfl_sync(0xffffffffU, scores[h] * scale, column());
      if constexpr (kQuantized) maxima_[h] -= __log2f(weight);
      sums_[h] = row() == 0 ? weight : 0.0F;
    }
#pragma unroll
    for (int g = 0; g < kValueGroups; ++g) {
#pragma unroll
      for (int first = 0; first < kLoad; first += kVecSize) {
        float value[kVecSize] = {};
        if (value_element(g) < kHeadSize) load_shared(value, shared.new_value + value_element(g) + first);
#pragma unroll
        for (int i = 0; i < kVecSize; ++i) {
          float (&tile)[4] = results_[g][(first + i) / 2];
          tile[i % 2 * 2] = tile[i % 2 * 2 + 1] = kQuantized ? value[i] * factor : value[i];
        }
      }
    }
  }

  // The subtracted maximum may lag behind the true one, so that results are seldom rescaled: float32 sums and 16-bit
  // probabilities have room for 2^kSlack.
  __device__ __forceinline__ void raise_maxima(const float (&scores)[4]) {
    const float first = fmaxf(scores[0], scores[2]);
    const float second = fmaxf(scores[1], scores[3]);
    if (!__any_sync(0xffffffffU, first > maxima_[0] + kSlack || second > maxima_[1] + kSlack)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float maximum = fmaxf(maxima_[h], h == 0 ? first : second);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffU, maximum, offset));
      }
      const float factor = exp2_approximately(maxima_[h] - maximum);
      maxima_[h] = maximum;
      sums_[h] *= factor;
#pragma unroll
      for (auto& group : results_)
#pragma unroll
        for (auto& tile : group) {
          tile[h] *= factor;
          tile[2 + h] *= factor;
        }
    }
  }

  // The probabilities of 16 positions, times `scales` of positions row() and row() + 8, as operand b of two mma.
  __device__ __forceinline__ void apply_softmax(uint32_t (&probabilities)[2], const float (&scores)[4],
                                                const float (&scales)[2]) {
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = exp2_approximately(scores[i] - maxima_[i % 2]);
      sums_[i % 2] += weights[i];
      if constexpr (kQuantized) weights[i] *= scales[i / 2];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      probabilities[i] = movmatrix_trans(pack_pair<Operand>(weights[2 * i], weights[2 * i + 1]));
    }
  }

  __device__ __forceinline__ void add_values(const float (&scores)[4], const FullPack (&values)[4][kValueGroups]) {
    uint32_t probabilities[2];
    apply_softmax(probabilities, scores, {1.0F, 1.0F});
#pragma unroll
    for (int g = 0; g < kValueGroups; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto word = [&](int value) { return values[value][g].words[i]; };
        const uint32_t tile[4] = {__byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                                  __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632)};
        mma_m16n8k16<Operand>(results_[g][i], tile, probabilities[0], probabilities[1]);
      }
  }

  // Likewise from codes; codes of two positions are brought together before they are converted.
  template <CacheDataType kType>
  __device__ __forceinline__ void add_codes(const float (&scores)[4], uint32_t tile, int first) {
    float scales[2];
    float biased[4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int position = first + row_position(r);
      scales[r] = stream_.start + position < end_ ? load_scale(tile, position) : 0.0F;
      const float logarithm = __log2f(fmaxf(scales[r], kLeastScale));
      biased[2 * r] = scores[2 * r] + logarithm;
      biased[2 * r + 1] = scores[2 * r + 1] + logarithm;
    }
    raise_maxima(biased);
    FullPack codes[4][kValueGroups];
    load_values(codes, tile, first);
    uint32_t probabilities[2];
    apply_softmax(probabilities, scores, scales);
#pragma unroll
    for (int g = 0; g < kValueGroups; ++g)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        uint32_t pairs[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t word = codes[2 * j][g].words[i / 2];
          const uint32_t next = codes[2 * j + 1][g].words[i / 2];
          codes_to_float16<kType>(pairs[j], __byte_perm(word, next, i % 2 == 0 ? 0x5140 : 0x7362));
        }
        const uint32_t operand[4] = {pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]};
        mma_m16n8k16<Operand>(results_[g][i], operand, probabilities[0], probabilities[1]);
      }
  }

  int end_;
  Stream stream_;
  // Of heads 2 * column() and 2 * column() + 1; until write(), sums are of the lane's own rows.
  float maxima_[2] = {kLowestScore, kLowestScore};
  float sums_[2] = {};
  // Tile i of group g: element value_element(g) + 2 i of both heads, then the element after it of both.
  float results_[kValueGroups][kLoad / 2][4] = {};
};

}  // namespace qwen_plugins::decoding
