"""The fields of every plug-in, good ones, and wrong ones with what is said about them.

A plug-in is called by its name, and those of another version than "1" with a colon and their version behind it.
"""

from typing import Any

import numpy as np


def key_of(name: str, version: str) -> str:
    return name if version == "1" else f"{name}:{version}"


def name_and_version(key: str) -> tuple[str, str]:
    name, _, version = key.partition(":")
    return name, version or "1"


ATTENTION_FIELDS = {
    *("type_id", "num_heads", "num_kv_heads", "head_size", "rotary_embedding_dim", "position_embedding_type"),
    *("q_scaling", "query_scale", "qk_norm", "norm_eps"),
}
ATTENTION = {
    **{"type_id": np.int32(1), "num_heads": np.int32(8), "num_kv_heads": np.int32(2), "head_size": np.int32(64)},
    **{"rotary_embedding_dim": np.int32(64), "position_embedding_type": np.int32(2)},
}
QUANTIZED_GEMM_FIELDS = {
    *("type_id", "in_features", "out_features", "weight_bits", "group_size", "zeros", "scale_type_id"),
    *("bias", "activation", "constant_weight", "kernels"),
}
QUANTIZED_GEMM = {
    **{"type_id": np.int32(1), "in_features": np.int32(192), "out_features": np.int32(96), "weight_bits": np.int32(4)},
    **{"group_size": np.int32(64), "zeros": np.int32(1)},
}
EIGHT_BIT_GEMM_FIELDS = {
    *("type_id", "x_type_id", "in_features", "out_features", "group_size", "has_per_token_scaling", "quantize_output"),
    *("bias", "activation", "constant_weight", "kernels"),
}
EIGHT_BIT_GEMM = {
    **{"type_id": np.int32(1), "x_type_id": np.int32(6), "in_features": np.int32(192), "out_features": np.int32(96)},
    **{"group_size": np.int32(128), "has_per_token_scaling": np.int32(1)},
}
QUANTIZE_FIELDS = {"type_id", "out_type_id", "int32_output"}
QUANTIZE = {"type_id": np.int32(1), "out_type_id": np.int32(6), "int32_output": np.int32(1)}
FIELDS = {
    "RmsNorm": {"eps", "type_id", "weight_type_id", "residual", "unit_offset", "round_before_weight"},
    "RmsNormQuantization": {
        *("eps", "type_id", "weight_type_id", "dyn_act_scaling", "out_type_id", "residual"),
        *("smoothing", "smoothing_type_id", "unit_offset", "int32_output"),
    },
    "QuantizePerToken": QUANTIZE_FIELDS,
    "QuantizeTensor": QUANTIZE_FIELDS,
    "Gemm": {"type_id", "bias", "activation", "constant_weight", "kernels"},
    "QwenGemm": {"type_id", "bias", "activation", "constant_weight", "kernels"},
    "GptAttention": ATTENTION_FIELDS,
    "GptAttention:2": ATTENTION_FIELDS | {"tokens_per_block", "kv_cache_type", "context_type"},
    "Gemm:2": QUANTIZED_GEMM_FIELDS,
    "QwenGemm:2": QUANTIZED_GEMM_FIELDS,
    "Gemm:3": EIGHT_BIT_GEMM_FIELDS,
    "QwenGemm:3": EIGHT_BIT_GEMM_FIELDS,
}
# Of the state in engines; earlier versions are read, too.
SCHEMA_VERSIONS = dict.fromkeys(FIELDS, 1) | dict.fromkeys(
    ("Gemm", "QwenGemm", "RmsNormQuantization", "GptAttention:2"), 2
)
NUM_OUTPUTS = dict.fromkeys(FIELDS, 1) | dict.fromkeys(
    ("RmsNormQuantization", "QuantizePerToken", "GptAttention", "GptAttention:2"), 2
)
FLOAT_FIELDS = {"eps", "q_scaling", "norm_eps"}
GOOD_FIELDS = {
    "RmsNorm": {"eps": np.float32(1e-5), "type_id": np.int32(1)},
    "RmsNormQuantization": {"eps": np.float32(1e-5), "type_id": np.int32(1), "dyn_act_scaling": np.int32(1)},
    "Gemm": {"type_id": np.int32(1)},
    "QwenGemm": {"type_id": np.int32(1)},
    "GptAttention": ATTENTION,
    "GptAttention:2": ATTENTION | {"tokens_per_block": np.int32(64)},
    "Gemm:2": QUANTIZED_GEMM,
    "QwenGemm:2": QUANTIZED_GEMM,
    "Gemm:3": EIGHT_BIT_GEMM,
    "QwenGemm:3": EIGHT_BIT_GEMM,
    "QuantizePerToken": QUANTIZE,
    "QuantizeTensor": QUANTIZE,
}

EVERY_PLUGIN = [
    ({"type_id": np.int8(1)}, "field 'type_id' has type INT8; expected INT32"),
    ({"type_id": np.int32([1, 1])}, "field 'type_id' has 2 values; expected 1"),
    ({"type_id": np.int32(3)}, "field 'type_id' is 3; expected 0 (float32), 1 (float16)"),
    ({"type_id": np.int32(-2147483648)}, "field 'type_id' is -2147483648"),
    ({"type_id": None}, "required field 'type_id' is missing"),
    ({"epsilon": np.float32(1e-5)}, "unknown field 'epsilon'; expected "),
]
RMS_NORM = [
    ({"eps": np.float16(1e-5)}, "field 'eps' has type FLOAT16; expected FLOAT32"),
    ({"eps": np.int32(1)}, "field 'eps' has type INT32; expected FLOAT32"),
    ({"eps": np.float32([1e-5, 1e-5])}, "field 'eps' has 2 values; expected 1"),
    ({"eps": np.float32(0)}, "field 'eps' is 0.000000; expected a finite number above 0"),
    ({"eps": np.float32(np.nan)}, "field 'eps' is nan"),
    ({"weight_type_id": np.int32(2)}, "field 'weight_type_id' is 2; expected 0 (float32), 1 (float16)"),
    ({"residual": np.int32(7)}, "field 'residual' is 7; expected 0 or 1"),
]
GEMM = [
    ({"bias": np.int32(2)}, "field 'bias' is 2; expected 0 or 1"),
    ({"activation": np.int32(-1)}, "field 'activation' is -1; expected one of 0, 1"),
    ({"constant_weight": np.int32(2)}, "field 'constant_weight' is 2; expected 0 or 1"),
    ({"kernels": np.int32([5])}, "field 'kernels' has 1 values; expected pairs"),
    ({"kernels": np.int32([5, 0, 5, 0])}, "field 'kernels' has 5 rows after 5; expected more rows"),
]
GPT_ATTENTION = [
    ({"num_heads": None}, "required field 'num_heads' is missing"),
    ({"num_heads": np.int32(0)}, "field 'num_heads' is 0; expected a number above 0"),
    ({"num_kv_heads": np.int32(3)}, "field 'num_kv_heads' is 3; expected a divisor of num_heads, 8"),
    ({"head_size": np.int32(48)}, "field 'head_size' is 48; expected one of 32, 64, 80, 96, 128, 256"),
    ({"rotary_embedding_dim": np.int32(66)}, "field 'rotary_embedding_dim' is 66; expected an even number from 0 to"),
    ({"position_embedding_type": np.int32(0)}, "'position_embedding_type' is 0 and 'rotary_embedding_dim' 64"),
    ({"position_embedding_type": np.int32(4)}, "field 'position_embedding_type' is 4; expected one of 0, 1, 2"),
    ({"q_scaling": np.float32(0)}, "field 'q_scaling' is 0.000000; expected a finite number above 0"),
    ({"qk_norm": np.int32(2)}, "field 'qk_norm' is 2; expected 0 or 1"),
]
PAGES = [
    ({"tokens_per_block": None}, "required field 'tokens_per_block' is missing"),
    ({"tokens_per_block": np.int32(16)}, "field 'tokens_per_block' is 16; expected one of 64"),
    ({"kv_cache_type": np.int32(3)}, "field 'kv_cache_type' is 3; expected one of 0, 1, 2"),
    ({"context_type": np.int32(3)}, "field 'context_type' is 3; expected one of 0, 1, 2"),
]
QUANTIZED = [
    ({"weight_bits": None}, "required field 'weight_bits' is missing"),
    ({"weight_bits": np.int32(3)}, "field 'weight_bits' is 3; expected one of 4, 8"),
    ({"group_size": np.int32(128)}, "field 'in_features' is 192; expected a multiple of 128"),
    ({"scale_type_id": np.int32(0)}, "field 'scale_type_id' is 0; expected one of 1, 7"),
]
EIGHT_BIT = [
    ({"x_type_id": None}, "required field 'x_type_id' is missing"),
    ({"x_type_id": np.int32(1)}, "field 'x_type_id' is 1; expected 2 (int8), 6 (float8_e4m3fn)"),
    ({"x_type_id": np.int32(2)}, "field 'group_size' is 128; expected one of 0"),
    ({"in_features": np.int32(190)}, "field 'in_features' is 190; expected a multiple of 4"),
    ({"quantize_output": np.int32(2)}, "field 'quantize_output' is 2; expected 0 or 1"),
]
CODES = [
    ({"out_type_id": np.int32(1)}, "field 'out_type_id' is 1; expected 2 (int8)"),
    ({"int32_output": np.int32(2)}, "field 'int32_output' is 2; expected 0 or 1"),
]
REFUSED_FIELDS = [
    *[(name, *case) for name in FIELDS for case in EVERY_PLUGIN],
    *[(name, *case) for name in ("RmsNorm", "RmsNormQuantization") for case in RMS_NORM],
    *[(name, *case) for name in ("Gemm", "Gemm:2", "Gemm:3") for case in GEMM],
    *[("Gemm:3", *case) for case in EIGHT_BIT],
    *[(name, *case) for name in ("RmsNormQuantization", "QuantizePerToken", "QuantizeTensor") for case in CODES],
    *[("Gemm:2", *case) for case in QUANTIZED],
    *[(name, *case) for name in ("GptAttention", "GptAttention:2") for case in GPT_ATTENTION],
    *[("GptAttention:2", *case) for case in PAGES],
]

_kept: list[dict[str, np.ndarray]] = []  # a PluginField refers to the memory of its array


def field_collection(trt: Any, fields: dict[str, Any]) -> Any:
    """Return the fields as a module of TensorRT's takes them; the type follows from each array's."""
    arrays = {name: np.atleast_1d(value) for name, value in fields.items()}
    _kept.append(arrays)
    return trt.PluginFieldCollection(
        [
            trt.PluginField(name, array, getattr(trt.PluginFieldType, array.dtype.name.upper()))
            for name, array in arrays.items()
        ]
    )
