// Choosing tokens, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_sampling(pybind11::module_& module);

}  // namespace qwen_plugins
