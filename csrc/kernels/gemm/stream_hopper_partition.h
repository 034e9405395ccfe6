// How the streaming kernels of Hopper (stream_hopper.cuh) divide a GEMM among blocks, and their launch. A shape's
// elements are of 16 bits here: two 8-bit codes are one element.
#pragma once

#include <type_traits>
#include <vector>

#include "gemm_kernel.h"
#include "hopper_clusters.h"

namespace qwen_plugins {

struct StreamHopperArguments;

// How a GEMM is divided, whatever its size.
struct StreamHopperVariant {
  int x_rows;  // of a tile
  int splits;  // blocks of a cluster, which split k
  int waves;   // tiles of a block, 1 where k is split
};

// Of a model of the cycles that a launch takes in a chain of launches. Not a theory: fitted to measurements of a
// kernel, so that the order of its variants comes out right (docs/gemm.md).
struct StreamHopperCosts {
  double loaded;       // bytes that a multiprocessor loads in a cycle
  double wgmma;        // cycles of a chunk for each that its wgmmas would take alone
  double latency;      // cycles of a chunk besides
  double memory;       // bytes of the weight that all load in a cycle
  double overlap;      // the part of the lesser of the two times above that is added to the greater
  double small_start;  // cycles before the first chunk, where two blocks fit into a multiprocessor
  double start;        // or do not
  double exchange;     // cycles where k is split, and
  double exchanged;    // bytes of sums that a block sends in a cycle
  double written;      // cycles for each row of x that a block owns
  double tile;         // cycles for each tile of a block
};

// What differs between the kernels.
struct StreamHopperKernel {
  std::vector<int> x_rows;            // that a tile can have, multiples of 8 from the fewest to the most
  int (*max_warpgroups)(int x_rows);  // that multiply, of a block
  StreamHopperCosts costs;
};

// The rows of x that a tile can have as constants, for which kernels are compiled: StreamHopperKernel::x_rows.
template <int... kRows>
struct XRows {
  static std::vector<int> all() { return {kRows...}; }

  // Returns launch(constant) for the constant that is x_rows.
  template <typename Launch>
  static cudaError_t with(int x_rows, const Launch& launch) {
    cudaError_t error = cudaErrorInvalidValue;
    ((x_rows == kRows ? error = launch(std::integral_constant<int, kRows>()) : error), ...);
    return error;
  }
};

// A variant for a GEMM on a device.
struct StreamHopperPartition {
  bool fits = false;  // the device can run it; all else is set only then
  int tile_rows = 0;  // weight rows of a tile: a multiple of 8, with SwiGLU of 16
  int groups = 0;     // warpgroups that multiply
  int owned_tiles = 0;
  int64_t tiles = 0;  // of the weight and of x
  int row_tiles = 0;
  int blocks = 0;  // of the grid
  int weight_stages = 0, x_stages = 0;
  int shared_bytes = 0;
  bool is_small = false;  // two blocks fit into a multiprocessor: that of the next launch loads its first weights early

  StreamHopperPartition() = default;
  StreamHopperPartition(const GemmShape& shape, const StreamHopperVariant& variant, const StreamHopperKernel& kernel,
                        const ClustersAtOnce& clusters, const DeviceProperties& device);

 private:
  int other_bytes(const StreamHopperVariant& variant) const;
  bool divide_into_stages(const StreamHopperVariant& variant, int most_bytes);
};

// The variants of a kernel.
class StreamHopperVariants {
 public:
  explicit StreamHopperVariants(StreamHopperKernel kernel);

  std::vector<GemmVariant> names() const;
  // Whether the device can run this GEMM in a variant, or for kOwnVariant in any.
  bool fit(const GemmShape& shape, const DeviceProperties& device, int32_t number) const;
  // Whether a variant is among those that should be the fastest.
  bool is_candidate(const GemmShape& shape, const DeviceProperties& device, int32_t number) const;
  // Gives a variant, for kOwnVariant the one that should be the fastest, and its partition. cudaErrorNotSupported where
  // the device cannot run it.
  cudaError_t choose(const GemmShape& shape, const DeviceProperties& device, int32_t number,
                     StreamHopperVariant& variant, StreamHopperPartition& partition) const;

 private:
  double cycles_or_infinite(const GemmShape& shape, const StreamHopperVariant& variant, const ClustersAtOnce& clusters,
                            const DeviceProperties& device) const;
  bool is_padded(const GemmShape& shape, const StreamHopperVariant& variant) const;

  StreamHopperKernel kernel_;
  std::vector<StreamHopperVariant> variants_;
};

// Sets what all kernels' arguments have; cudaErrorNotSupported where the driver cannot encode a tensor map.
cudaError_t set_arguments(const GemmParams& params, const StreamHopperVariant& variant,
                          const StreamHopperPartition& partition, StreamHopperArguments& arguments);
dim3 threads_of(const StreamHopperPartition& partition);

// Launches a kernel whose arguments are StreamHopperArguments, or derive from them with what is of this kernel alone
// set.
template <typename Arguments>
cudaError_t launch_stream(void (*kernel)(Arguments), Arguments arguments, const GemmParams& params,
                          const StreamHopperVariant& variant, const StreamHopperPartition& partition,
                          const DeviceProperties& device, cudaStream_t stream) {
  // The first call, since it makes the device's context current in this thread, as encoding tensor maps requires.
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.max_shared_memory_per_block);
      error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = set_arguments(params, variant, partition, arguments); error != cudaSuccess) {
    return error;
  }
  return launch_clusters(kernel, dim3(static_cast<unsigned>(partition.blocks)), threads_of(partition),
                         static_cast<size_t>(partition.shared_bytes), variant.splits, device, stream, arguments);
}

}  // namespace qwen_plugins
