// Stands in for the kernels where there is no GPU: the launchers write down what they were called with.
#pragma once

#include <optional>

#include "kernels/rms_norm.h"

struct RecordedLaunches {
  std::optional<qwen_plugins::RmsNormParams> rms_norm;
  std::optional<qwen_plugins::RmsNormQuantParams> rms_norm_quant;
  cudaStream_t stream = nullptr;
  int count = 0;
  cudaError_t answer = cudaSuccess;  // what the launchers return
};

extern RecordedLaunches recorded;
