// How the kernels that read a sequence's logits several times are laid out.
#pragma once

#include <cstdint>

#include "cut.cuh"
#include "kernels/common/launch.h"

namespace qwen_plugins {

// Blocks that share a sequence of so many groups of logits: no more than all sequences find room for at once.
inline int cluster_size(int sequences, int groups, const DeviceProperties& device) {
  int cluster = device.programmatic_launch ? Cluster::kMaxSize : 1;  // a device has both or neither
  while (cluster > 1 && (cluster * sequences > device.multiprocessors || cluster / 2 * kCutThreads >= groups)) {
    cluster /= 2;
  }
  return cluster;
}

// Whether every row of logits can be read in full packs.
template <typename T, typename Params>
bool in_packs(const Params& p) {
  return reinterpret_cast<uintptr_t>(p.logits) % sizeof(FullPack) == 0 && p.vocab_size % kVec<T> == 0 &&
         (p.logits_row_stride % kVec<T> == 0 || p.sequences == 1);
}

}  // namespace qwen_plugins
