// Quantization to 8 bits, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_quantize(pybind11::module_& module);

}  // namespace qwen_plugins
