"""Print what NVIDIA's Python bindings see of the layers that `qwen_plugins.tensorrt` adds.

test_real_registries.py runs it as a process of its own, where the lean runtime stands for tensorrt.
"""

import importlib.machinery
import json
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import tensorrt_lean as trt

trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
sys.modules["tensorrt"] = trt
warnings.simplefilter("error")

import qwen_plugins.tensorrt  # noqa: F401, E402
from qwen_plugins.tensorrt import layers  # noqa: E402

ATTENTION: dict[str, int | float] = {
    "type_id": int(trt.float16),
    "num_heads": 28,
    "num_kv_heads": 4,
    "head_size": 128,
    "rotary_embedding_dim": 128,
    "position_embedding_type": 2,
    "q_scaling": 1.0,
    "query_scale": 0,
    "qk_norm": 0,
    "norm_eps": 1e-6,
}
QUANTIZED_GEMM: dict[str, int | float] = {
    **{"type_id": int(trt.float16), "in_features": 192, "out_features": 96, "weight_bits": 4, "group_size": 64},
    **{"zeros": 1, "bias": 0, "activation": 1, "constant_weight": 1},
}
EIGHT_BIT_GEMM: dict[str, int | float] = {
    **{"type_id": int(trt.float16), "x_type_id": 6, "in_features": 192, "out_features": 96, "group_size": 128},
    **{"has_per_token_scaling": 1, "quantize_output": 1, "bias": 1, "activation": 1, "constant_weight": 1},
}
QUANTIZE: dict[str, int | float] = {"type_id": int(trt.float16), "out_type_id": 2, "int32_output": 1}
PLUGINS: dict[str, dict[str, int | float]] = {
    "RmsNorm": {"eps": 1e-6, "type_id": int(trt.float16), "weight_type_id": int(trt.float16), "residual": 1},
    "RmsNormQuantization": {
        "eps": 1e-6,
        "type_id": int(trt.bfloat16),
        "weight_type_id": int(trt.bfloat16),
        "dyn_act_scaling": 1,
        "out_type_id": int(trt.fp8),
    },
    "Gemm": {"type_id": int(trt.bfloat16), "bias": 0, "activation": 1, "constant_weight": 1},
    "QwenGemm": {"type_id": int(trt.float16), "bias": 1, "activation": 0, "constant_weight": 1},
    "Gemm:2": QUANTIZED_GEMM,
    "QwenGemm:2": QUANTIZED_GEMM,
    "Gemm:3": EIGHT_BIT_GEMM,
    "QwenGemm:3": EIGHT_BIT_GEMM,
    "QuantizePerToken": QUANTIZE,
    "QuantizeTensor": QUANTIZE,
    "GptAttention": ATTENTION,
    "GptAttention:2": {**ATTENTION, "tokens_per_block": 64, "kv_cache_type": 1, "context_type": 2},
}


class Network:
    """Take a plug-in as `INetworkDefinition` does, and call what the builder would call."""

    def get_flag(self, flag: object) -> bool:
        return True

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Any) -> SimpleNamespace:
        core, build, _ = (
            plugin.get_capability_interface(kind)
            for kind in (
                trt.PluginCapabilityType.CORE,
                trt.PluginCapabilityType.BUILD,
                trt.PluginCapabilityType.RUNTIME,
            )
        )
        names = [core.plugin_name, core.plugin_version, core.plugin_namespace]
        return SimpleNamespace(num_outputs=1, get_output=lambda i: [*names, build.num_outputs])


layers.is_strongly_typed = lambda network: True
found = {}
for key, fields in PLUGINS.items():
    name, _, version = key.partition(":")
    found[key] = layers.add_plugin(Network(), name, ["x"], fields, name, [trt.float16], version or "1")[0]
try:
    layers.add_plugin(Network(), "Gemm", ["x"], {"type_id": 99}, "wrong", [trt.float16])
except RuntimeError as error:
    found["refused"] = str(error)
print(json.dumps(found))
