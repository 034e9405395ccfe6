// Messages to TensorRT's log; no exception may reach TensorRT.
#pragma once

#include <exception>
#include <string>

#include "tensorrt_api.h"

namespace qwen_plugins {

// Sets the logger finder, which TensorRT passes when it loads the library. Before that, messages go to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Logs an error of a plug-in.
void log_error(char const* plugin_name, char const* message) noexcept;

// Calls `body` and returns its result. If it throws, logs the error and returns `on_error`.
template <typename Result, typename Body>
Result guarded(char const* plugin_name, Result on_error, Body&& body) noexcept {
  try {
    return body();
  } catch (std::exception const& error) {
    log_error(plugin_name, error.what());
  } catch (...) {
    log_error(plugin_name, "unknown exception");
  }
  return on_error;
}

}  // namespace qwen_plugins
