// The functions that IPluginRegistry::loadLibrary of TensorRT 8.6 looks up by name.
#include "all_plugins.h"
#include "dynamic_ext_adapter.h"

using namespace qwen_plugins;

QWEN_PLUGINS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { set_logger_finder(finder); }

QWEN_PLUGINS_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  return creators_of<DynamicExtCreator, nvinfer1::IPluginCreator>(AllPlugins{}, count);
}
