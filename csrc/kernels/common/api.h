// Marks the functions that the shared library of kernels exports; all others are hidden.
#pragma once

#ifdef QWEN_PLUGINS_STATIC_KERNELS
#define QWEN_PLUGINS_API
#else
#define QWEN_PLUGINS_API __attribute__((visibility("default")))
#endif
