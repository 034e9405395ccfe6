// The Python module qwen_plugins._core: the launchers of the kernels, without any framework. Its public name is
// qwen_plugins.launch. Callers check their arguments: device addresses cannot be checked here.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "activation.h"
#include "attention.h"
#include "embedding.h"
#include "gemm.h"
#include "packed_weight.h"
#include "quantize.h"
#include "rms_norm.h"
#include "sampling.h"
#include "types.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The launchers of the CUDA kernels, which qwen_plugins.launch documents and exports.";
  module.attr("CUDA_VERSION") = CUDART_VERSION;  // such as 13000: of the runtime that is linked into the kernels
  qwen_plugins::bind_types(module);
  qwen_plugins::bind_activation(module);
  qwen_plugins::bind_attention(module);
  qwen_plugins::bind_embedding(module);
  qwen_plugins::bind_gemm(module);
  qwen_plugins::bind_packed_weight(module);
  qwen_plugins::bind_quantize(module);
  qwen_plugins::bind_rms_norm(module);
  qwen_plugins::bind_sampling(module);
}
