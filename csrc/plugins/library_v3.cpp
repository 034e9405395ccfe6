// The functions that IPluginRegistry::loadLibrary of TensorRT 10 and 11 looks up by name.
#include "gemm/eight_bit_gemm_plugin.h"
#include "gemm/gemm_plugin.h"
#include "gemm/quantized_gemm_plugin.h"
#include "gpt_attention/gpt_attention_plugin.h"
#include "plugin_v3_adapter.h"
#include "quantize/quantize_plugin.h"
#include "rms_norm/rms_norm_plugin.h"
#include "rms_norm_quantization/rms_norm_quantization_plugin.h"

#define QWEN_PLUGINS_EXPORT extern "C" __attribute__((visibility("default")))

// TensorRT calls setLoggerFinder and then getCreators, in one thread for each library that it loads.
static thread_local bool fits_this_tensorrt = true;

QWEN_PLUGINS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  fits_this_tensorrt = qwen_plugins::set_logger_finder(finder);
}

QWEN_PLUGINS_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static qwen_plugins::PluginV3Creator<qwen_plugins::RmsNormPlugin> rms_norm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::RmsNormQuantizationPlugin> rms_norm_quantization;
  static qwen_plugins::PluginV3Creator<qwen_plugins::GemmPlugin> gemm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::GptAttentionPlugin> gpt_attention;
  static qwen_plugins::PluginV3Creator<qwen_plugins::QwenGemm<qwen_plugins::GemmPlugin>> qwen_gemm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::PagedGptAttentionPlugin> paged_gpt_attention;
  static qwen_plugins::PluginV3Creator<qwen_plugins::QuantizedGemmPlugin> quantized_gemm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::QwenGemm<qwen_plugins::QuantizedGemmPlugin>> qwen_quantized_gemm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::EightBitGemmPlugin> eight_bit_gemm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::QwenGemm<qwen_plugins::EightBitGemmPlugin>> qwen_eight_bit_gemm;
  static qwen_plugins::PluginV3Creator<qwen_plugins::QuantizePerTokenPlugin> quantize_per_token;
  static qwen_plugins::PluginV3Creator<qwen_plugins::QuantizeTensorPlugin> quantize_tensor;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&rms_norm,
                                                                &rms_norm_quantization,
                                                                &gemm,
                                                                &gpt_attention,
                                                                &qwen_gemm,
                                                                &paged_gpt_attention,
                                                                &quantized_gemm,
                                                                &qwen_quantized_gemm,
                                                                &eight_bit_gemm,
                                                                &qwen_eight_bit_gemm,
                                                                &quantize_per_token,
                                                                &quantize_tensor};
  count = fits_this_tensorrt ? static_cast<int32_t>(std::size(creators)) : 0;
  return creators;
}
