// What the launchers of Hopper's GEMM kernels share: which operands TMA can load, and tensor maps of x and the weight.
#pragma once

#include <cuda.h>

#include "gemm.h"
#include "kernels/common/launch.h"

namespace qwen_plugins {

constexpr int kBlockK = 64;  // elements of k in a pipeline stage: the 128 bytes of the swizzle

// Whether the device is Hopper, and TMA and the kernels can take operands of these types, sizes and addresses.
bool can_use_tma(const GemmParams& params, const DeviceProperties& device);

// Encode tensor maps for loads of kBlockK elements of k and `box_rows` rows; conditions and result are those of
// encode_tensor_map.
//
// The weight's: with SwiGLU a box alternates 8 gate rows and the 8 up rows that belong to them, and the coordinates are
// k, row within a group of 8, gate (0) or up (1), group of 8 gate rows; otherwise they are k, row, 0, 0.
bool encode_weight_tensor_map(CUtensorMap& tensor_map, const GemmParams& params, int box_rows);
// That of x; the coordinates are k, row.
bool encode_x_tensor_map(CUtensorMap& tensor_map, const GemmParams& params, int box_rows);

}  // namespace qwen_plugins
