// Messages to TensorRT's log, and the border that no exception crosses.
#pragma once

#include <exception>
#include <string>

#include "tensorrt_api.h"

namespace qwen_plugins {

// TensorRT hands this over when it loads the library. Before that, and without it, messages go to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

void log_error(char const* plugin_name, char const* message) noexcept;

// Calls `body`; what it throws becomes an error in TensorRT's log and the result `on_error`.
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
