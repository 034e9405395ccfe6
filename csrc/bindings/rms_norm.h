// RMSNorm, alone and with quantization, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_rms_norm(pybind11::module_& module);

}  // namespace qwen_plugins
