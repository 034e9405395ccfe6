"""Add the RMSNorm plug-ins to a network of TensorRT-LLM: the functions of `qwen_plugins.tensorrt`, on its tensors.

They add to the network of ``tensorrt_llm.net_guard``, as those of ``tensorrt_llm.functional`` do. This module needs
``tensorrt_llm``, from 0.11 on: earlier versions bring a TensorRT for which there is no plug-in library.
"""

from typing import Any

try:
    from tensorrt_llm._common import default_trtnet
    from tensorrt_llm.functional import Tensor, _create_tensor
except ImportError as error:
    raise ImportError(f"qwen_plugins.tensorrt_llm needs the tensorrt_llm package ({error})") from error

from . import tensorrt as plugins
from .tensorrt.layers import free_name

__all__ = ["rms_norm", "rms_norm_quant"]


def rms_norm(
    x: Tensor,
    weight: Any,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    unit_offset: bool = False,
    round_before_weight: bool = False,
    dtype: Any = None,
    name: str | None = None,
) -> Any:
    """Add y = h / sqrt(mean(h²) + eps) · weight over the last dimension, with h = x + residual, or h = x without one.

    Args:
        x, residual: as in `qwen_plugins.tensorrt.rms_norm`, each a ``tensorrt_llm.Tensor``.
        weight: [hidden_size], a ``Tensor``, a ``tensorrt_llm.Parameter`` or an array.
        eps, unit_offset, round_before_weight, dtype: as in `qwen_plugins.tensorrt.rms_norm`.
        name: prefix of the names of the layer's constants; TensorRT-LLM gives the layer itself a name of its own.

    Returns:
        y, a ``Tensor`` with the shape of x; with a residual, (y, x + residual).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    network = default_trtnet()
    name = name or free_name(network, "rms_norm")
    options = {"unit_offset": unit_offset, "round_before_weight": round_before_weight, "dtype": dtype, "name": name}
    outputs = plugins.rms_norm(network, _itensor(x), _itensor(weight), eps, _itensor(residual), **options)
    return _tensors(network, name, outputs)


def rms_norm_quant(
    x: Tensor,
    weight: Any,
    eps: float = 1e-6,
    *,
    scale: Any = None,
    smoothing: Any = None,
    residual: Tensor | None = None,
    name: str | None = None,
    **options: Any,
) -> Any:
    """Add `rms_norm` followed by quantization: q = saturate(round(y / smoothing / scale)).

    Args:
        x, weight, eps, residual, name: as in `rms_norm`.
        scale, smoothing: as in `qwen_plugins.tensorrt.rms_norm_quant`, each a ``Tensor``, a ``Parameter`` or values.
        options: ``quant_dtype``, ``unit_offset`` and ``dtype``, as there.

    Returns:
        q with the shape of x; in dynamic quantization followed by the scales, float32 of shape [..., 1]; with a
        residual followed by x + residual. A tuple unless q is the only output.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    network = default_trtnet()
    name = name or free_name(network, "rms_norm_quant")
    tensors = {"scale": _itensor(scale), "smoothing": _itensor(smoothing), "residual": _itensor(residual)}
    outputs = plugins.rms_norm_quant(network, _itensor(x), _itensor(weight), eps, **tensors, **options, name=name)
    return _tensors(network, name, outputs)


def _itensor(value: Any) -> Any:
    """Return the ``ITensor`` of a ``Tensor`` or a ``Parameter``; anything else as it is."""
    value = getattr(value, "value", value)
    return getattr(value, "trt_tensor", value)


def _tensors(network: Any, name: str, outputs: Any) -> Any:
    """Return a ``Tensor`` for each output of the layer of that name."""
    layers = (network.get_layer(i) for i in reversed(range(network.num_layers)))
    producer = next(layer for layer in layers if layer.name == name)
    if isinstance(outputs, tuple):
        return tuple(_create_tensor(output, producer) for output in outputs)
    return _create_tensor(outputs, producer)
