#include "packed_weight.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace qwen_plugins {
namespace {

constexpr int kWordK = 32;  // k between the first elements of words of int4, in a block

// The codes of a superblock in natural order.
struct Codes {
  uint8_t of[kPackedRows][kPackedK];

  // Two neighbours of a row, the first in the lower half: 0x00bb00aa.
  uint32_t pair(int row, int k) const {
    return static_cast<uint32_t>(of[row][k]) | static_cast<uint32_t>(of[row][k + 1]) << 16;
  }
  void set_pair(int row, int k, uint32_t pair) {
    of[row][k] = static_cast<uint8_t>(pair);
    of[row][k + 1] = static_cast<uint8_t>(pair >> 16);
  }
};

// Calls `use(word, row, k)` for the words of a superblock, in their order: a word of int4 has the pairs at k, k + 8,
// k + 16 and k + 24, of int8 those at k and k + 8.
template <int kBits, typename Use>
void for_each_word(const Use& use) {
  constexpr int kStep = kBits == 4 ? kWordK : kWordK / 2;  // k of a word
  int word = 0;
  for (int block = 0; block < kPackedK / (2 * kStep); ++block) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < 2; ++j) use(word++, lane / 4 + 8 * half, (2 * block + j) * kStep + 2 * (lane % 4));
      }
    }
  }
}

template <int kBits>
void encode(const Codes& codes, uint8_t* superblock) {
  for_each_word<kBits>([&](int word, int row, int k) {
    uint32_t value = 0;
    for (int i = 0; i < 16 / kBits; ++i) value |= codes.pair(row, k + 8 * i) << (kBits * i);
    std::memcpy(superblock + 4 * word, &value, 4);
  });
}

template <int kBits>
void decode(const uint8_t* superblock, Codes& codes) {
  constexpr uint32_t kMask = kBits == 4 ? 0x000f000fU : 0x00ff00ffU;
  for_each_word<kBits>([&](int word, int row, int k) {
    uint32_t value = 0;
    std::memcpy(&value, superblock + 4 * word, 4);
    for (int i = 0; i < 16 / kBits; ++i) codes.set_pair(row, k + 8 * i, value >> (kBits * i) & kMask);
  });
}

// Calls `work(i)` for every i of [0, count), in up to `threads` threads.
void in_parallel(int64_t count, int threads, const std::function<void(int64_t)>& work) {
  const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
  const auto run = [&](int64_t part) {
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) work(i);
  };
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  run(0);
  for (std::thread& other : others) other.join();
}

// The work of packing 16 rows, and of unpacking them.
class RowBlocks {
 public:
  RowBlocks(const WeightFormat& format, int64_t rows, int64_t k, const UnpackedWeight& unpacked,
            const PackedWeight& packed)
      : format_(format),
        rows_(rows),
        k_(k),
        groups_(format.group_size == 0 ? 1 : k / format.group_size),
        sizes_(format, rows, k),
        unpacked_(unpacked),
        packed_(packed) {}

  int64_t count() const { return sizes_.rows / kPackedRows; }

  void pack(int64_t block) const {
    for (int64_t chunk = 0; chunk < sizes_.k / kPackedK; ++chunk) {
      Codes codes;
      for (int i = 0; i < kPackedRows; ++i) read_codes(block * kPackedRows + i, chunk * kPackedK, codes.of[i]);
      format_.kind == WeightKind::kInt4 ? encode<4>(codes, superblock(chunk, block))
                                        : encode<8>(codes, superblock(chunk, block));
    }
    for (int64_t row = block * kPackedRows; row < (block + 1) * kPackedRows; ++row) {
      for (int64_t group = 0; group < sizes_.groups; ++group) {
        const bool exists = row < rows_ && group < groups_;
        packed_.scales[group * sizes_.rows + row] = exists ? unpacked_.scales[row * groups_ + group] : 0;
        if (format_.has_zeros) packed_.zeros[group * sizes_.rows + row] = exists ? zero_of(row, group) : middle();
      }
    }
  }

  void unpack(int64_t block) const {
    for (int64_t chunk = 0; chunk < sizes_.k / kPackedK; ++chunk) {
      Codes codes;
      format_.kind == WeightKind::kInt4 ? decode<4>(superblock(chunk, block), codes)
                                        : decode<8>(superblock(chunk, block), codes);
      for (int i = 0; i < kPackedRows; ++i) write_codes(block * kPackedRows + i, chunk * kPackedK, codes.of[i]);
    }
    for (int64_t row = block * kPackedRows; row < std::min((block + 1) * kPackedRows, rows_); ++row) {
      for (int64_t group = 0; group < groups_; ++group) {
        unpacked_.scales[row * groups_ + group] = packed_.scales[group * sizes_.rows + row];
        if (format_.has_zeros) unpacked_.zeros[row * groups_ + group] = packed_.zeros[group * sizes_.rows + row];
      }
    }
  }

 private:
  uint8_t* superblock(int64_t chunk, int64_t block) const {
    return packed_.codes + (chunk * count() + block) * superblock_bytes_of(format_.kind);
  }
  uint8_t middle() const { return static_cast<uint8_t>(middle_code_of(format_.kind)); }
  uint8_t zero_of(int64_t row, int64_t group) const {
    return format_.has_zeros ? unpacked_.zeros[row * groups_ + group] : middle();
  }

  int64_t codes_of_row(int64_t row, int64_t first_k) const {
    return row >= rows_ ? 0 : std::clamp<int64_t>(k_ - first_k, 0, kPackedK);
  }
  void read_codes(int64_t row, int64_t first_k, uint8_t* codes) const {
    const int64_t count = codes_of_row(row, first_k);
    if (count > 0) std::memcpy(codes, unpacked_.codes + row * k_ + first_k, count);
    // Groups of the format end with k; the group of all inputs goes on.
    const bool goes_on = format_.group_size == 0 && row < rows_;
    std::memset(codes + count, goes_on ? zero_of(row, 0) : middle(), kPackedK - count);
  }
  void write_codes(int64_t row, int64_t first_k, const uint8_t* codes) const {
    const int64_t count = codes_of_row(row, first_k);
    if (count > 0) std::memcpy(unpacked_.codes + row * k_ + first_k, codes, count);
  }

  const WeightFormat& format_;
  const int64_t rows_, k_, groups_;
  const PackedSizes sizes_;
  const UnpackedWeight& unpacked_;
  const PackedWeight& packed_;
};

}  // namespace

void pack_weight(const WeightFormat& format, int64_t rows, int64_t k, const UnpackedWeight& from,
                 const PackedWeight& to, int threads) {
  const RowBlocks blocks(format, rows, k, from, to);
  in_parallel(blocks.count(), threads, [&](int64_t block) { blocks.pack(block); });
}

void unpack_weight(const WeightFormat& format, int64_t rows, int64_t k, const PackedWeight& from,
                   const UnpackedWeight& to, int threads) {
  const RowBlocks blocks(format, rows, k, to, from);
  in_parallel(blocks.count(), threads, [&](int64_t block) { blocks.unpack(block); });
}

}  // namespace qwen_plugins
