#include "recorded_launches.h"

#include <algorithm>
#include <cstring>

RecordedLaunches recorded;

namespace {

template <typename Params>
cudaError_t record(std::optional<Params>& slot, Params const& params, cudaStream_t stream) {
  slot = params;
  recorded.stream = stream;
  ++recorded.count;
  return recorded.answer;
}

}  // namespace

namespace qwen_plugins {

cudaError_t launch_rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  return record(recorded.rms_norm, params, stream);
}

cudaError_t launch_rms_norm_quant(const RmsNormQuantParams& params, cudaStream_t stream) {
  return record(recorded.rms_norm_quant, params, stream);
}

cudaError_t launch_quantize(const QuantizeParams& params, cudaStream_t stream) {
  return record(recorded.quantize, params, stream);
}

cudaError_t gemm_workspace_bytes(const GemmShape& shape, GemmChoice choice, int64_t* bytes) {
  *bytes = recorded_gemm_workspace(shape.rows, shape.in_features, static_cast<int32_t>(choice));
  return recorded.answer;
}

cudaError_t launch_gemm(const GemmParams& params, cudaStream_t stream) { return record(recorded.gemm, params, stream); }

cudaError_t launch_prefill_attention(const PrefillAttentionParams& params, cudaStream_t stream) {
  return record(recorded.prefill_attention, params, stream);
}

cudaError_t decode_attention_workspace_bytes(const AttentionHeads&, int32_t sequences, int64_t* bytes) {
  *bytes = recorded_attention_workspace(sequences);
  return recorded.answer;
}

cudaError_t launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  return record(recorded.decode_attention, params, stream);
}

const char* error_string(cudaError_t) { return "recorded error"; }

cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind == cudaMemcpyDeviceToDevice) {
    recorded.copy = RecordedCopy{to, from, bytes};
    return cudaSuccess;
  }
  auto const found = recorded.device_memory.find(from);
  if (found == recorded.device_memory.end()) {
    std::memset(to, 0xFF, bytes);
  } else {
    std::memcpy(to, found->second.data(), std::min(bytes, found->second.size() * sizeof(int32_t)));
  }
  return cudaSuccess;
}

cudaError_t synchronize(cudaStream_t) { return cudaSuccess; }

}  // namespace qwen_plugins
