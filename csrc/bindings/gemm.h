// The GEMM of a linear layer, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_gemm(pybind11::module_& module);

}  // namespace qwen_plugins
