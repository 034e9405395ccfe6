// The activation function SwiGLU, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_activation(pybind11::module_& module);

}  // namespace qwen_plugins
