"""This package has CUDA kernels and TensorRT plug-ins for Qwen and its relatives.

Importing it registers the plug-ins with each installed TensorRT: ``tensorrt``, ``tensorrt_lean``, ``tensorrt_dispatch``
(8.6, 10 or 11) and ``tensorrt_rtx``. It needs neither PyTorch nor a GPU. The functions on tensors import PyTorch when
they are first used:

    qwen_plugins.rms_norm(x, weight)          qwen_plugins.rms_norm_quant(x, weight)
    qwen_plugins.gemm(x, weight, bias)        qwen_plugins.QuantizedWeight
    qwen_plugins.quantize(x, torch.int8)      qwen_plugins.scaled_gemm(x, weight, x_scales, weight_scales)

They are also custom operators, ``torch.ops.qwen_plugins.*``, registered with the first use of one of these functions or
with ``import qwen_plugins.torch_ops``. What else a decoder needs on a GPU is in modules that import PyTorch:

    qwen_plugins.attention      attention of prompts and of new tokens, with rotary embedding and key-value cache
    qwen_plugins.activation     SwiGLU
    qwen_plugins.embedding      gathering rows by token
    qwen_plugins.sampling       choosing tokens

``qwen_plugins.tensorrt`` has a function for each plug-in, which adds it to a network. ``qwen_plugins.launch`` has the
kernels' launchers on device addresses, without checks and without a framework.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from qwen_plugins.registration import TENSORRT_PACKAGES, register_tensorrt_plugins, tensorrt_library_path

if TYPE_CHECKING:
    from qwen_plugins.torch_ops import (
        QuantizedWeight,
        cublas_lt_status,
        gemm,
        quantize,
        rms_norm,
        rms_norm_quant,
        scaled_gemm,
    )

__all__ = [
    "QuantizedWeight",
    "cublas_lt_status",
    "gemm",
    "quantize",
    "rms_norm",
    "rms_norm_quant",
    "scaled_gemm",
    "tensorrt_library_path",
]
__version__ = "0.1.0"

_TORCH_FUNCTIONS = tuple(name for name in __all__ if name != "tensorrt_library_path")

logging.getLogger(__name__).addHandler(logging.NullHandler())  # else logging prints warnings by itself
for _package in TENSORRT_PACKAGES:
    register_tensorrt_plugins(_package)


def __getattr__(name: str) -> Any:
    """Import PyTorch with the first use of a function that needs it."""
    if name not in _TORCH_FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from qwen_plugins import torch_ops
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f'qwen_plugins.{name} needs PyTorch: pip install "qwen-plugins[torch]"', name="torch"
        ) from None

    globals().update({function: getattr(torch_ops, function) for function in _TORCH_FUNCTIONS})
    return globals()[name]
