#include "stream_launch.cuh"

namespace qwen_plugins {

cudaError_t launch_gemm_stream_bfloat16(const GemmParams& params, StreamVariant variant, const DeviceProperties& device,
                                        cudaStream_t stream) {
  return launch_stream_variant<__nv_bfloat16>(params, variant, device, stream);
}

}  // namespace qwen_plugins
