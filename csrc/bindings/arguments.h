// How device memory, streams and errors pass between Python and the launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace qwen_plugins {

// Device pointers and streams come as integers, as every framework can give them; 0 is none.
using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// An error of CUDA as a Python RuntimeError.
inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace qwen_plugins
