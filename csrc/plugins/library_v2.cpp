// The functions that IPluginRegistry::loadLibrary of TensorRT 8.6 looks up by name.
#include "dynamic_ext_adapter.h"
#include "gemm/eight_bit_gemm_plugin.h"
#include "gemm/gemm_plugin.h"
#include "gemm/quantized_gemm_plugin.h"
#include "gpt_attention/gpt_attention_plugin.h"
#include "quantize/quantize_plugin.h"
#include "rms_norm/rms_norm_plugin.h"
#include "rms_norm_quantization/rms_norm_quantization_plugin.h"

#define QWEN_PLUGINS_EXPORT extern "C" __attribute__((visibility("default")))

QWEN_PLUGINS_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { qwen_plugins::set_logger_finder(finder); }

QWEN_PLUGINS_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
  static qwen_plugins::DynamicExtCreator<qwen_plugins::RmsNormPlugin> rms_norm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::RmsNormQuantizationPlugin> rms_norm_quantization;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::GemmPlugin> gemm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::GptAttentionPlugin> gpt_attention;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::QwenGemm<qwen_plugins::GemmPlugin>> qwen_gemm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::PagedGptAttentionPlugin> paged_gpt_attention;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::QuantizedGemmPlugin> quantized_gemm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::QwenGemm<qwen_plugins::QuantizedGemmPlugin>> qwen_quantized_gemm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::EightBitGemmPlugin> eight_bit_gemm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::QwenGemm<qwen_plugins::EightBitGemmPlugin>> qwen_eight_bit_gemm;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::QuantizePerTokenPlugin> quantize_per_token;
  static qwen_plugins::DynamicExtCreator<qwen_plugins::QuantizeTensorPlugin> quantize_tensor;
  static nvinfer1::IPluginCreator* const creators[] = {&rms_norm,
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
  count = static_cast<int32_t>(std::size(creators));
  return creators;
}
