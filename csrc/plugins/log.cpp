#include "log.h"

#include <atomic>
#include <cstdio>

namespace qwen_plugins {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

nvinfer1::ILogger* find_logger() {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  return finder == nullptr ? nullptr : finder->findLogger();
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_error(char const* plugin_name, char const* message) noexcept {
  try {
    std::string const line = std::string("[qwen_plugins] ") + plugin_name + ": " + message;
    if (nvinfer1::ILogger* logger = find_logger()) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, line.c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {
    std::fputs("[qwen_plugins] an error could not be logged\n", stderr);
  }
}

}  // namespace qwen_plugins
