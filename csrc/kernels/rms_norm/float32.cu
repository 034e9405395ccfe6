#include "launch.cuh"

namespace qwen_plugins {

template cudaError_t launch_rms_norm_of_type<float>(const RmsNormPlan& plan, cudaStream_t stream);

}  // namespace qwen_plugins
