// The functions that IPluginRegistry::loadLibrary of TensorRT 10 and 11 looks up by name.
#include "all_plugins.h"
#include "plugin_v3_adapter.h"

using namespace qwen_plugins;

// TensorRT calls setLoggerFinder and then getCreators, in one thread for each library that it loads.
static thread_local bool fits_this_tensorrt = true;

QWEN_PLUGINS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  fits_this_tensorrt = set_logger_finder(finder);
}

QWEN_PLUGINS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  nvinfer1::IPluginCreatorInterface* const* const creators =
      creators_of<PluginV3Creator, nvinfer1::IPluginCreatorInterface>(AllPlugins{}, count);
  if (!fits_this_tensorrt) {
    count = 0;
  }
  return creators;
}
