"""Pack quantized layers as published checkpoints have them: GPTQ and compressed-tensors, which other engines load.

See checkpoints/quantized_layers.py for the layouts, which reads what is written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.quantized_weight import Codes, QuantizedWeight
from .options import QuantizationOptions

Array = npt.NDArray[Any]
FORMATS = ("compressed-tensors", "gptq")


def layer_tensors(stored_as: str, weight: QuantizedWeight) -> dict[str, Array]:
    """Return a layer's tensors by the last part of their names; the scales as they are in `weight`.

    stored_as: of `FORMATS`.
    """
    return _TENSORS[stored_as](weight)


def quantization_config(stored_as: str, options: QuantizationOptions) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint whose layers, but for the head, are quantized like this."""
    bits = {"int4": 4, "int8": 8}[options.kind]
    group_size = options.group_size if options.kind == "int4" else -1
    return _CONFIGURATIONS[stored_as](bits, group_size, options.symmetric)


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


def _gptq_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
    }


def _compressed_tensors(weight: QuantizedWeight) -> dict[str, Array]:
    tensors: dict[str, Array] = {
        "weight_packed": _words(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": np.array(weight.codes.shape, np.int64),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = _words(weight.zeros.T.copy(), weight.bits).T.copy()
    return tensors


def _compressed_tensors_config(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    grouped = group_size > 0
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
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
_CONFIGURATIONS: dict[str, Callable[[int, int, bool], dict[str, Any]]] = {
    "gptq": _gptq_config,
    "compressed-tensors": _compressed_tensors_config,
}
