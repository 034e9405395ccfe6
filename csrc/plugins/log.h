// Messages to TensorRT's log; no exception may reach TensorRT.
#pragma once

#include <exception>
#include <string>

#include "tensorrt_api.h"

namespace qwen_plugins {

// Takes the logger finder, which TensorRT passes when it loads the library. Before that, messages go to stderr. Returns
// false, and says on stderr why, where the finder is of a TensorRT that this library is not for: calling it would call
// another function than the one that finds the logger.
bool set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Log a message about a layer or a plug-in: `subject`.
void log_error(std::string const& subject, char const* message) noexcept;
void log_warning(std::string const& subject, char const* message) noexcept;

// Returns the plug-in's name and the layer's, if it has one, for messages.
inline std::string subject_of(char const* plugin_name, char const* layer_name) {
  bool const named = layer_name != nullptr && *layer_name != '\0';
  return named ? std::string(plugin_name) + " '" + layer_name + "'" : plugin_name;
}

// Calls `body` and returns its result. If it throws, logs the error and returns `on_error`.
template <typename Result, typename Body>
Result guarded(std::string const& subject, Result on_error, Body&& body) noexcept {
  try {
    return body();
  } catch (std::exception const& error) {
    log_error(subject, error.what());
  } catch (...) {
    log_error(subject, "unknown exception");
  }
  return on_error;
}

}  // namespace qwen_plugins
