// The GEMM for any type, size and alignment: correct, and slow.
#pragma once

#include "gemm_kernel.h"

namespace qwen_plugins {

GemmKernel plain_kernel();

}  // namespace qwen_plugins
