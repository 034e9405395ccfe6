// An entry of the table of GEMM kernels: what a kernel can compute, what the rules give to it, and how it is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "gemm.h"
#include "kernels/common/launch.h"

namespace qwen_plugins {

// Serialised engines hold these numbers and those of the variants: none may change, and that of a kernel that is gone
// may not be given to another.
enum class GemmKernelId : int32_t {
  kStream = 1,
  kStreamHopper = 2,
  kTilesHopper = 3,
  kCublasLt = 4,
  kStreamInParts = 5,
  kPlain = 6,
  kStreamQuantized = 7,
  kTilesQuantized = 8,
  kDequantized = 9,
  kTilesEightBit = 10,
  kStreamEightBit = 11,
  kCublasLtEightBit = 12,
};

// One of the configurations (tile sizes, splits, ...) in which a kernel can run.
struct GemmVariant {
  int32_t id;        // 1 to 65535
  std::string name;  // lower-case letters, digits and underscores
};
constexpr int32_t kOwnVariant = 0;  // the kernel chooses

// A GemmChoice has the kernel's number above these bits, and the variant's in them.
constexpr int kVariantBits = 16;

// The functions take valid parameters of at least one row; x_row_stride of a single row is in_features.
struct GemmKernel {
  GemmKernelId id;
  const char* name;  // lower-case letters, digits and underscores
  std::vector<GemmVariant> variants;
  // Whether the kernel can compute this GEMM on this device, in this variant or, for kOwnVariant, in any.
  bool (*takes)(const GemmParams&, const DeviceProperties&, int32_t variant);
  // Whether the rules give this GEMM, which it takes, to the kernel, where they give it to none before it in the table.
  bool (*is_for)(const GemmParams&, const DeviceProperties&);
  // Whether a variant that takes this GEMM may be the fastest, so that it is worth its time to measure it.
  bool (*is_candidate)(const GemmParams&, const DeviceProperties&, int32_t variant);
  // Of any variant; it does not decrease with the number of rows.
  int64_t (*workspace_bytes)(const GemmShape&);
  // cudaErrorNotSupported, with nothing launched, for what only the attempt shows.
  cudaError_t (*launch)(const GemmParams&, const DeviceProperties&, int32_t variant, cudaStream_t);
};

// All kernels of this build. The rules' choice is the first that takes a GEMM and is for it; the last takes every GEMM.
const std::vector<GemmKernel>& gemm_kernels();

// The kernel and the variant of a choice; kernel is null where this build has none of these numbers.
struct ChosenKernel {
  const GemmKernel* kernel;
  int32_t variant;
};
ChosenKernel find_kernel(GemmChoice choice);

// The first kernel after `previous` (null: of all) that takes this GEMM and that the rules give it to; null after the
// last.
const GemmKernel* next_by_rules(const GemmParams& params, const DeviceProperties& device, const GemmKernel* previous);

// Launches params.choice, of the rules where it is kByRules. cudaErrorNotSupported, with nothing launched, where it
// cannot compute this GEMM.
cudaError_t launch_choice(const GemmParams& params, const DeviceProperties& device, cudaStream_t stream);

// Whether a weight with that many inputs can have this format, and whether launch_gemm computes GEMMs of this shape.
bool is_valid(const WeightFormat& format, int64_t in_features);
bool is_valid(const GemmShape& shape);

inline int64_t no_workspace(const GemmShape&) { return 0; }

// The GEMM of rows [first, first + count) alone.
GemmParams rows_of(const GemmParams& params, int64_t first, int64_t count);

// For kernels of weights that are not quantized, that work on 16-bit elements in packs of 16 bytes: whether the shape
// allows them, given aligned addresses, and whether x and the weight are aligned.
bool is_in_packs(const GemmShape& shape);
bool is_aligned(const GemmParams& params);

}  // namespace qwen_plugins
