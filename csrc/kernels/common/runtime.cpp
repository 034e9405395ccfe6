#include "runtime.h"

namespace qwen_plugins {

const char* error_string(cudaError_t error) { return cudaGetErrorString(error); }

cudaError_t copy_async(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, kind, stream);
}

cudaError_t synchronize(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

}  // namespace qwen_plugins
