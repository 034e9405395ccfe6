// qwen_plugins._core: the launchers for Python. Nothing here knows a framework: device pointers and streams are
// integers.
#include <pybind11/pybind11.h>

#include "attention.h"
#include "gemm.h"
#include "rms_norm.h"
#include "sampling.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "CUDA kernels on raw device pointers. Use the functions of qwen_plugins, which check their arguments.";
  qwen_plugins::bind_rms_norm(module);
  qwen_plugins::bind_attention(module);
  qwen_plugins::bind_gemm(module);
  qwen_plugins::bind_sampling(module);
}
