// Decode attention for up to eight query heads that share a key-value head, on tensor cores (mma.m16n8k16): scores^T =
// K · q^T has a row for each position and a column for each head; context^T = V^T · P^T a row for each element of the
// values and a column for each head.
//
// Half of a block's warps read the cache, each its own tiles of 16 positions; the others prepare q meanwhile. Keys and
// values go from shared memory to registers with 16-byte loads and are not rearranged there: a row, column or k index
// of an mma may stand for any element, as long as both operands agree. Only the probabilities are rearranged between
// the two matrix multiplies, 8 x 8 of them with one movmatrix.
#pragma once

#include "decode_cluster.cuh"
#include "decode_stream.cuh"
#include "decode_work.cuh"

namespace qwen_plugins::decoding {

template <typename T, int kHeadSize>
class TileAttention {
 public:
  static constexpr int kHeads = 8;
  static constexpr int kVectors = kHeadSize / kVecSize;  // of a query
  static constexpr int kWarps = kHeadSize > 128 ? 8 : 16;
  static constexpr bool kInClusters = true;
  static constexpr int kReaders = kWarps / 2;  // warps of a large block that read the cache

  using Stream = CacheStream<T, kHeadSize>;
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

  // Converts a query to T; called by the warp that has prepared it.
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

  __device__ __forceinline__ TileAttention(const DecodeAttentionParams& p, const Work& work, SharedMemory& shared)
      : end_(work.end),
        stream_(rows<Cached::kKeys>(p, work), rows<Cached::kValues>(p, work),
                warp() < num_readers() ? work.begin + warp() * kStep : work.end, work.end, num_readers() * kStep,
                shared.tiles[warp() % kReaders], shared.barriers[warp() % kReaders]) {}

  // `scale` includes log2(e): the softmax is computed with exp2.
  __device__ __forceinline__ void attend(const Work& work, float scale, const SharedMemory& shared) {
    if (work.has_new_token && warp() == num_readers() - 1) begin_with_new_token(scale, shared);
    for (; !stream_.done(); stream_.advance()) {
      FullPack keys[2][kKeyChunks];
      load_keys(keys, stream_.wait_for(Cached::kKeys));
      float scores[4];
      multiply_keys(scores, keys, shared);
      stream_.release(Cached::kKeys);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[i] = stream_.start + row() + i / 2 * 8 < end_ ? scores[i] * scale : kLowestScore;
      raise_maxima(scores);
      FullPack values[4][kValueGroups];
      load_values(values, stream_.wait_for(Cached::kValues));
      add_values(scores, values);
      stream_.release(Cached::kValues);
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
        const int element = 64 * g + row() * kVecSize;
        if (element >= kHeadSize) continue;
        auto* const to = reinterpret_cast<float4*>(shared.values(warp(), head) + element);
        to[0] = make_float4(results_[g][0][h], results_[g][0][2 + h], results_[g][1][h], results_[g][1][2 + h]);
        to[1] = make_float4(results_[g][2][h], results_[g][2][2 + h], results_[g][3][h], results_[g][3][2 + h]);
      }
    }
  }

 private:
  static constexpr int kStep = Stream::kStep;
  static constexpr int kKeyChunks = (kHeadSize + 31) / 32;    // a quad of lanes has 32 elements of a key
  static constexpr int kValueGroups = (kHeadSize + 63) / 64;  // eight lanes have 64 elements of a value
  static constexpr float kSlack = 8.0F;  // by how much a scaled score may exceed the maximum that is subtracted

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int num_readers() { return static_cast<int>(blockDim.x) / 64; }
  // A lane's row and column in the fragments of mma_m16n8k16.
  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % 4; }

  template <Cached kWhich>
  static __device__ __forceinline__ const T* rows(const DecodeAttentionParams& p, const Work& work) {
    return static_cast<const T*>(p.cache.data) +
           cache_offset(p.heads, p.cache, work.sequence, static_cast<int>(kWhich), work.kv_head);
  }
  // 16 bytes of a tile: elements `element` and on of position `position`.
  static __device__ __forceinline__ FullPack load(uint32_t tile, int position, int element) {
    FullPack result;
    const uint32_t from = tile + static_cast<uint32_t>((position * kHeadSize + element) * static_cast<int>(sizeof(T)));
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(result.words[0]), "=r"(result.words[1]), "=r"(result.words[2]), "=r"(result.words[3])
                 : "r"(from)
                 : "memory");
    return result;
  }

  // Loads keys row() and row() + 8 of the tile, eight elements from 8 * column() on of each chunk of 32. Scores of
  // positions from the end on are not used.
  static __device__ __forceinline__ void load_keys(FullPack (&keys)[2][kKeyChunks], uint32_t tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < kKeyChunks; ++c) {
        const int element = 32 * c + column() * kVecSize;
        keys[r][c] = {};
        if (kHeadSize % 32 == 0 || element < kHeadSize) keys[r][c] = load(tile, row() + 8 * r, element);
      }
  }

  // Loads values 2 * column(), 2 * column() + 1 and those plus 8 of the tile, eight elements from 8 * row() on of each
  // group of 64. Positions from the end on are set to zero: what is there may be NaN, which a probability of 0 would
  // not hide.
  __device__ __forceinline__ void load_values(FullPack (&values)[4][kValueGroups], uint32_t tile) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int g = 0; g < kValueGroups; ++g) {
        const int position = 2 * column() + i % 2 + i / 2 * 8;
        const int element = 64 * g + row() * kVecSize;
        values[i][g] = {};
        if (stream_.start + position < end_ && (kHeadSize % 64 == 0 || element < kHeadSize)) {
          values[i][g] = load(tile, position, element);
        }
      }
  }

  static __device__ __forceinline__ void read_vector(FullPack& vector, const float* from) {
    float elements[kVecSize];
    load_shared(elements, from);
    vector = pack<T>(elements);
  }

  // The scores of keys row() and row() + 8 for heads 2 * column() and 2 * column() + 1, from two accumulators that do
  // not wait for each other. Queries stay in shared memory; a lane reads those of head row().
  __device__ __forceinline__ void multiply_keys(float (&scores)[4], const FullPack (&keys)[2][kKeyChunks],
                                                const SharedMemory& shared) const {
    float sums[2][4] = {};
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
      const int vector = 4 * c + column();
      FullPack query = {};
      if (kHeadSize % 32 == 0 || vector * kVecSize < kHeadSize) query = shared.packed_queries[row()][vector];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t tile[4] = {keys[0][c].words[2 * i], keys[1][c].words[2 * i], keys[0][c].words[2 * i + 1],
                                  keys[1][c].words[2 * i + 1]};
        mma_m16n8k16<T>(sums[i], tile, query.words[2 * i], query.words[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = sums[0][i] + sums[1][i];
  }

  // The new token comes first: relative to its score, its probability is 1.
  __device__ __forceinline__ void begin_with_new_token(float scale, const SharedMemory& shared) {
    FullPack keys[2][kKeyChunks] = {};
#pragma unroll
    for (int c = 0; c < kKeyChunks; ++c) {
      const int element = 32 * c + column() * kVecSize;
      if (row() == 0 && element < kHeadSize) read_vector(keys[0][c], shared.new_key + element);
    }
    float scores[4];
    multiply_keys(scores, keys, shared);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maxima_[h] = __shfl_sync(0xffffffffU, scores[h] * scale, column());
      sums_[h] = row() == 0 ? 1.0F : 0.0F;
    }
#pragma unroll
    for (int g = 0; g < kValueGroups; ++g) {
      const int element = 64 * g + row() * kVecSize;
      float value[kVecSize] = {};
      if (element < kHeadSize) load_shared(value, shared.new_value + element);
#pragma unroll
      for (int i = 0; i < kVecSize; ++i) results_[g][i / 2][i % 2 * 2] = results_[g][i / 2][i % 2 * 2 + 1] = value[i];
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

  __device__ __forceinline__ void add_values(const float (&scores)[4], const FullPack (&values)[4][kValueGroups]) {
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[i] = exp2_approximately(scores[i] - maxima_[i % 2]);
      sums_[i % 2] += weights[i];
    }
    const uint32_t first = movmatrix_trans(pack_pair<T>(weights[0], weights[1]));
    const uint32_t second = movmatrix_trans(pack_pair<T>(weights[2], weights[3]));
#pragma unroll
    for (int g = 0; g < kValueGroups; ++g)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto word = [&](int value) { return values[value][g].words[i]; };
        const uint32_t tile[4] = {__byte_perm(word(0), word(1), 0x5410), __byte_perm(word(0), word(1), 0x7632),
                                  __byte_perm(word(2), word(3), 0x5410), __byte_perm(word(2), word(3), 0x7632)};
        mma_m16n8k16<T>(results_[g][i], tile, first, second);
      }
  }

  int end_;
  Stream stream_;
  // Of heads 2 * column() and 2 * column() + 1; until write(), sums are of the lane's own rows.
  float maxima_[2] = {kLowestScore, kLowestScore};
  float sums_[2] = {};
  // Tile i of group g: element 64 g + 8 row() + 2 i of both heads, then the element after it of both.
  float results_[kValueGroups][4][4] = {};
};

}  // namespace qwen_plugins::decoding
