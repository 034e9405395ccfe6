// Packing of quantized weights, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_packed_weight(pybind11::module_& module);

}  // namespace qwen_plugins
