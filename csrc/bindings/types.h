// The enumerations of the kernels, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_types(pybind11::module_& module);

}  // namespace qwen_plugins
