// Gathering the rows of an embedding, for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace qwen_plugins {

void bind_embedding(pybind11::module_& module);

}  // namespace qwen_plugins
