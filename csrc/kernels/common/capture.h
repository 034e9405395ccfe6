// Calls that stream capture would forbid.
#pragma once

#include <cuda_runtime_api.h>

namespace qwen_plugins {

// While it lives this thread may make calls that allocate or synchronise although a stream is captured; they do not
// become part of the graph.
class OutsideOfCapture {
 public:
  OutsideOfCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCapture(const OutsideOfCapture&) = delete;
  OutsideOfCapture& operator=(const OutsideOfCapture&) = delete;
  ~OutsideOfCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace qwen_plugins
