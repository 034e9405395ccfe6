#include "stream_launch.cuh"

namespace qwen_plugins {

cudaError_t launch_gemm_stream_bfloat16(const GemmParams& params, cudaStream_t stream) {
  return launch_stream_of_type<__nv_bfloat16>(params, stream);
}

}  // namespace qwen_plugins
