// Stands in for the kernels where there is no GPU: the launchers record their arguments.
#pragma once

#include <map>
#include <optional>
#include <vector>

#include "kernels/attention/decode.h"
#include "kernels/attention/prefill.h"
#include "kernels/common/runtime.h"
#include "kernels/gemm/gemm.h"
#include "kernels/quantize/quantize.h"
#include "kernels/rms_norm/rms_norm.h"

struct RecordedCopy {
  void* to;
  void const* from;
  size_t bytes;
};

struct RecordedLaunches {
  std::optional<qwen_plugins::RmsNormParams> rms_norm;
  std::optional<qwen_plugins::RmsNormQuantParams> rms_norm_quant;
  std::optional<qwen_plugins::QuantizeParams> quantize;
  std::optional<qwen_plugins::GemmParams> gemm;
  std::optional<qwen_plugins::PrefillAttentionParams> prefill_attention;
  std::optional<qwen_plugins::DecodeAttentionParams> decode_attention;
  std::optional<RecordedCopy> copy;                           // on the device
  std::map<void const*, std::vector<int32_t>> device_memory;  // what copies to the host find; -1 elsewhere
  cudaStream_t stream = nullptr;
  int count = 0;                     // of launches
  cudaError_t answer = cudaSuccess;  // what the launchers return
};

extern RecordedLaunches recorded;

// The results of the stand-ins for gemm_workspace_bytes and decode_attention_workspace_bytes. As the real one, the
// former is larger where in_features is no multiple of 8, and for a kernel that the rules did not choose.
constexpr int64_t recorded_gemm_workspace(int64_t rows, int64_t in_features, int32_t choice = 0) {
  return 1000 + rows + (in_features % 8 == 0 ? 0 : 500) + (choice == 0 ? 0 : 2000);
}
constexpr int64_t recorded_attention_workspace(int64_t sequences) { return 2000 + sequences; }
