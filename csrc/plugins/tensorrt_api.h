// TensorRT's plug-in interfaces: from the official headers where CMake found those of this major version, else from our
// own declarations.
#pragma once

#if defined(QWEN_PLUGINS_OFFICIAL_TENSORRT_HEADERS)
#include <NvInferRuntime.h>
#elif QWEN_PLUGINS_TENSORRT_MAJOR >= 10
#include "declarations/tensorrt_v3.h"
#else
#include "declarations/tensorrt_v2.h"
#endif
