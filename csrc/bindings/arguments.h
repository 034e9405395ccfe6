// How device memory, streams and errors pass between Python and the launchers.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/common/runtime.h"

namespace qwen_plugins {

// Device pointers and streams are integers, which every framework can pass; 0 is the null pointer or the default
// stream.
using Address = uintptr_t;

// Releases the GIL while a kernel is launched.
using Unlocked = pybind11::call_guard<pybind11::gil_scoped_release>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Throws what Python sees as a RuntimeError where CUDA reports an error.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + error_string(error));
}

}  // namespace qwen_plugins
