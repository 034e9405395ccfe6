#include "stream_launch.cuh"

namespace qwen_plugins {

cudaError_t launch_gemm_stream_float16(const GemmParams& params, cudaStream_t stream) {
  return launch_stream_of_type<__half>(params, stream);
}

}  // namespace qwen_plugins
