// The plug-ins of this library, whatever the TensorRT that it is for.
#pragma once

#include <cstdint>
#include <tuple>

#include "gemm/eight_bit_gemm_plugin.h"
#include "gemm/gemm_plugin.h"
#include "gemm/quantized_gemm_plugin.h"
#include "gpt_attention/gpt_attention_plugin.h"
#include "quantize/quantize_plugin.h"
#include "rms_norm/rms_norm_plugin.h"
#include "rms_norm_quantization/rms_norm_quantization_plugin.h"

// Functions that TensorRT looks up by name.
#define QWEN_PLUGINS_EXPORT extern "C" __attribute__((visibility("default")))

namespace qwen_plugins {

template <typename... Plugins>
struct PluginList {};

using AllPlugins =
    PluginList<RmsNormPlugin, RmsNormQuantizationPlugin, GemmPlugin, GptAttentionPlugin, QwenGemm<GemmPlugin>,
               PagedGptAttentionPlugin, QuantizedGemmPlugin, QwenGemm<QuantizedGemmPlugin>, EightBitGemmPlugin,
               QwenGemm<EightBitGemmPlugin>, QuantizePerTokenPlugin, QuantizeTensorPlugin>;

// Returns the creators of these plug-ins, which live until the process ends, behind TensorRT's interface of creators.
template <template <typename Plugin> class Creator, typename Interface, typename... Plugins>
Interface* const* creators_of(PluginList<Plugins...> /*plugins*/, int32_t& count) {
  static std::tuple<Creator<Plugins>...> creators;
  static Interface* const addresses[] = {&std::get<Creator<Plugins>>(creators)...};
  count = sizeof...(Plugins);
  return addresses;
}

}  // namespace qwen_plugins
