// cuBLASLt, loaded at run time: the functions and constants of it that are used here. Building needs no cuBLASLt.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/common/api.h"

namespace qwen_plugins {

// From cublasLt.h, whose values are part of its binary interface: the same in CUDA 12 and 13.
namespace cublas_lt {

constexpr int kSuccess = 0;
constexpr int kNotSupported = 15;
constexpr int kCompute32F = 68;  // cublasComputeType_t
constexpr int kCompute32I = 72;
constexpr int kTransposed = 1;  // cublasOperation_t
enum DescriptorAttribute { kTransA = 3, kEpilogue = 7, kBiasPointer = 8 };
constexpr uint32_t kEpilogueBias = 4;
constexpr uint32_t kReduceInComputeType = 2;  // cublasLtReductionScheme_t
enum PreferenceAttribute {
  kMaxWorkspaceBytes = 1,
  kReductionSchemes = 3,
  kMinAlignmentA = 5,
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8
};

using Handle = struct HandleOpaque*;
using Descriptor = struct DescriptorOpaque*;
using Layout = struct LayoutOpaque*;
using Preference = struct PreferenceOpaque*;
struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

}  // namespace cublas_lt

struct CublasLt {
  size_t (*version)();
  int (*create)(cublas_lt::Handle*);
  int (*descriptor_create)(cublas_lt::Descriptor*, int compute_type, cudaDataType scale_type);
  int (*descriptor_destroy)(cublas_lt::Descriptor);
  int (*descriptor_set)(cublas_lt::Descriptor, int attribute, const void* value, size_t bytes);
  int (*layout_create)(cublas_lt::Layout*, cudaDataType type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*layout_destroy)(cublas_lt::Layout);
  int (*preference_create)(cublas_lt::Preference*);
  int (*preference_destroy)(cublas_lt::Preference);
  int (*preference_set)(cublas_lt::Preference, int attribute, const void* value, size_t bytes);
  int (*heuristic)(cublas_lt::Handle, cublas_lt::Descriptor, cublas_lt::Layout a, cublas_lt::Layout b,
                   cublas_lt::Layout c, cublas_lt::Layout d, cublas_lt::Preference, int requested,
                   cublas_lt::HeuristicResult*, int* returned);
  int (*matmul)(cublas_lt::Handle, cublas_lt::Descriptor, const void* alpha, const void* a, cublas_lt::Layout,
                const void* b, cublas_lt::Layout, const void* beta, const void* c, cublas_lt::Layout, void* d,
                cublas_lt::Layout, const cublas_lt::Algorithm*, void* workspace, size_t workspace_bytes, cudaStream_t);
};

// Loads cuBLASLt at the first call, and returns null where that fails. It is the first of: the file that the
// environment variable QWEN_PLUGINS_CUBLASLT names ("none": cuBLASLt is not used); the one that the process has loaded
// already, such as PyTorch's; the one of the pip packages beside this package; the system's.
const CublasLt* load_cublas_lt();

// Returns the file that was loaded, or which files were tried and why the first of them could not be loaded.
QWEN_PLUGINS_API const std::string& cublas_lt_status();

// Returns cuBLASLt's version, such as 130100 for 13.1.0; 0 where none is in use.
QWEN_PLUGINS_API int64_t cublas_lt_version();

}  // namespace qwen_plugins
