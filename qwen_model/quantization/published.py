"""Pack quantized layers as published checkpoints have them: GPTQ and compressed-tensors, which other engines load.

See checkpoints/quantized_layers.py for the layouts, which reads what is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.eight_bit_weight import EightBitWeight
from ..checkpoints.quantized_weight import Codes, QuantizedWeight
from ..common.errors import QwenModelError
from .options import QuantizationOptions

Array = npt.NDArray[Any]
FORMATS = ("compressed-tensors", "gptq")


def layer_tensors(stored_as: str, weight: QuantizedWeight) -> dict[str, Array]:
    """Return a layer's tensors by the last part of their names; the scales as they are in `weight`.

    stored_as: of `FORMATS`.
    """
    return _TENSORS[stored_as](weight)


def eight_bit_tensors(weight: EightBitWeight, per_channel: bool) -> dict[str, Array]:
    """Return the tensors that compressed-tensors has of a layer that computes in 8 bits; fp8 codes are its bytes.

    per_channel: the scales are those of outputs; else all are the same, and one is kept.
    """
    tensors = {"weight": weight.codes, "weight_scale": weight.scales if per_channel else weight.scales[0]}
    if weight.input_scale is not None:
        tensors["input_scale"] = np.array([weight.input_scale], np.float32)
    return tensors


def quantization_config(stored_as: str, options: QuantizationOptions) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose layers are quantized like this.

    Raises:
        QwenModelError: the format has no such layers.
    """
    if options.quantizes_x and stored_as != "compressed-tensors":
        raise QwenModelError(f"quantization {options.kind} is written as compressed-tensors, not as {stored_as}")
    return _CONFIGURATIONS[stored_as](options)


def _bits_and_group(options: QuantizationOptions, kind: str) -> tuple[int, int]:
    """Return bits and group size of weights of a kind of `KINDS`; -1: a scale for each output."""
    return {"int4": (4, options.group_size), "int8": (8, -1)}[kind]


def _gptq_tensors(weight: QuantizedWeight) -> dict[str, Array]:
    out_features, in_features = weight.codes.shape
    groups = weight.scales.shape[1]
    if weight.zeros is None:  # of the first format, which every reader knows: one less than the zero point
        zeros = np.full((out_features, groups), (1 << weight.bits - 1) - 1, np.uint8)
    else:
        zeros = weight.zeros
    return {
        "qweight": _words(weight.codes, weight.bits).T.copy(),
        "qzeros": _words(zeros.T.copy(), weight.bits),
        "scales": weight.scales.T.copy(),
        "g_idx": (np.arange(in_features) // (in_features // groups)).astype(np.int32),
    }


def _gptq_config(options: QuantizationOptions) -> dict[str, Any]:
    bits, group_size = _bits_and_group(options, options.kind)
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": options.symmetric,
        "lm_head": options.head is not None,
        "checkpoint_format": "gptq" if options.symmetric else "gptq_v2",
    }
    if options.head not in (None, options.kind):
        head_bits, head_group_size = _bits_and_group(options, str(options.head))
        config["dynamic"] = {"+:lm_head": {"bits": head_bits, "group_size": head_group_size}}
    return config


def _compressed_tensors(weight: QuantizedWeight) -> dict[str, Array]:
    tensors: dict[str, Array] = {
        "weight_packed": _words(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": np.array(weight.codes.shape, np.int64),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = _words(weight.zeros.T.copy(), weight.bits).T.copy()
    return tensors


def _compressed_tensors_config(options: QuantizationOptions) -> dict[str, Any]:
    groups = {"group_0": _scheme(options) if options.quantizes_x else _packed_scheme(options, options.kind)}
    if options.head is not None:
        groups["group_1"] = {**_packed_scheme(options, options.head), "targets": ["re:.*lm_head$"]}
    formats = {group["format"] for group in groups.values()}
    if len(formats) == 1:
        for group in groups.values():
            del group["format"]  # older versions know only the one of all groups
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if options.head is not None else ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _packed_scheme(options: QuantizationOptions, kind: str) -> dict[str, Any]:
    bits, group_size = _bits_and_group(options, kind)
    weights = _arguments(bits, "int", "channel" if group_size == -1 else "group", symmetric=options.symmetric)
    weights["group_size"] = None if group_size == -1 else group_size
    return _group("pack-quantized", weights, None)


def _scheme(options: QuantizationOptions) -> dict[str, Any]:
    number = "float" if options.kind == "fp8" else "int"
    weights = _arguments(8, number, "channel" if options.per_channel else "tensor")
    inputs = _arguments(8, number, "token" if options.per_token else "tensor", dynamic=options.per_token)
    return _group(f"{number}-quantized", weights, inputs)


def _group(stored_as: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": stored_as,
    }


def _arguments(bits: int, number: str, strategy: str, symmetric: bool = True, dynamic: bool = False) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": number,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": None,
        "dynamic": dynamic,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }


def _words(codes: Codes, bits: int) -> npt.NDArray[np.int32]:
    """Pack codes along the last axis into words of 32 bits, from the low bits on, padded with zero bits."""
    per_word = 32 // bits
    padding = -codes.shape[1] % per_word
    if padding:
        codes = np.pad(codes, ((0, 0), (0, padding)))
    octets = codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(octets).view(np.int32)


_TENSORS: dict[str, Callable[[QuantizedWeight], dict[str, Array]]] = {
    "gptq": _gptq_tensors,
    "compressed-tensors": _compressed_tensors,
}
_CONFIGURATIONS: dict[str, Callable[[QuantizationOptions], dict[str, Any]]] = {
    "gptq": _gptq_config,
    "compressed-tensors": _compressed_tensors_config,
}
