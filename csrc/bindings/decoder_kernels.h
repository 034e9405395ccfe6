// The decoder's own kernels (SwiGLU, rotary embedding with cache, decode attention) for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_decoder_kernels(pybind11::module_& module);

}  // namespace qwen_plugins
