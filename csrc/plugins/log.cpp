#include "log.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdio>

namespace qwen_plugins {
namespace {

using nvinfer1::ILogger;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

// Returns the major version of the TensorRT library that holds the finder's virtual table, or 0 where that library does
// not say it: TensorRT 8.6, and TensorRT linked into a program.
int32_t major_version_of(nvinfer1::ILoggerFinder const* finder) {
  Dl_info info{};
  if (finder == nullptr || dladdr(*reinterpret_cast<void const* const*>(finder), &info) == 0) {
    return 0;
  }
  void* const library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) {
    return 0;
  }
  auto* const major_version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibMajorVersion"));
  int32_t const major = major_version == nullptr ? 0 : major_version();
  dlclose(library);
  return major;
}

// TensorRT-RTX 1 has the interfaces of TensorRT 11.
bool fits_this_library(int32_t major) {
  return major == 0 || major == QWEN_PLUGINS_TENSORRT_MAJOR || (major == 1 && QWEN_PLUGINS_TENSORRT_MAJOR == 11);
}

void log(ILogger::Severity severity, std::string const& subject, char const* message) noexcept {
  try {
    std::string const line = "[qwen_plugins] " + subject + ": " + message;
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    if (ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger()) {
      logger->log(severity, line.c_str());
    } else {
      std::fprintf(stderr, "%s\n", line.c_str());
    }
  } catch (...) {
    std::fputs("[qwen_plugins] a message could not be logged\n", stderr);
  }
}

}  // namespace

bool set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept {
  int32_t const major = major_version_of(finder);
  if (!fits_this_library(major)) {
    int32_t const wanted = major == 1 ? 11 : major;
    std::fprintf(stderr,
                 "[qwen_plugins] libqwen_plugins_trt%d.so was loaded into %s %d, which its interfaces do not fit, and "
                 "registers nothing; load libqwen_plugins_trt%d.so\n",
                 QWEN_PLUGINS_TENSORRT_MAJOR, major == 1 ? "TensorRT-RTX" : "TensorRT", major, wanted);
    return false;
  }
  logger_finder.store(finder);
  return true;
}

void log_error(std::string const& subject, char const* message) noexcept {
  log(ILogger::Severity::kERROR, subject, message);
}

void log_warning(std::string const& subject, char const* message) noexcept {
  log(ILogger::Severity::kWARNING, subject, message);
}

}  // namespace qwen_plugins
