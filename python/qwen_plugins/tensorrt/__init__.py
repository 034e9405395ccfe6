"""Add the plug-ins to a TensorRT network: RMSNorm, alone and with quantization, quantization, Gemm and GptAttention.

Each function adds one operation to an ``INetworkDefinition`` and returns its output tensors. With ``plugin=False`` the
RMSNorm functions add the same operation in TensorRT's own layers, to compare with or to build engines that need no
plug-in library. This package needs the ``tensorrt`` package: 8.6, 10 or 11.

In TensorRT 8.6 (and 10, unless the network is strongly typed) the builder chooses each layer's precision. There,

* a plug-in in float16 needs the builder flag ``FP16``, an int8 output the flag ``INT8``;
* the native layers are marked to compute in float32, which the builder obeys if the flag
  ``OBEY_PRECISION_CONSTRAINTS`` is set: without it the squares of float16 values may overflow.

`configure_builder` sets the flags that a network with these layers needs.
"""

from typing import Any

try:
    import tensorrt as trt
except ImportError as error:
    raise ImportError(
        f'qwen_plugins.tensorrt needs the tensorrt package: pip install "qwen-plugins[tensorrt]" ({error})'
    ) from error

from .attention import gpt_attention
from .layers import as_array, check_network
from .linear import gemm
from .native import NativeLayers, is_strongly_typed
from .normalization import rms_norm, rms_norm_quant
from .quantization import quantize
from .scaled_linear import scaled_gemm

__all__ = [
    "configure_builder",
    "constant",
    "gemm",
    "gpt_attention",
    "is_strongly_typed",
    "quantize",
    "rms_norm",
    "rms_norm_quant",
    "scaled_gemm",
]


def constant(network: Any, array: Any, dtype: Any, name: str) -> Any:
    """Add a constant tensor, which has the type ``dtype`` in every version of TensorRT.

    TensorRT 8.6 treats constants as float32, and converts them where they are used, unless layer and tensor say
    otherwise; NumPy, and so ``tensorrt.Weights`` of an array, has no bfloat16.

    Args:
        network: ``INetworkDefinition`` to add to.
        array: the values, in any numeric type of NumPy or ml_dtypes. An array that has ``dtype`` already is not
            copied, and must not change until the engine is built.
        dtype: ``tensorrt.DataType`` of the tensor.
        name: prefix of the layer's name.

    Returns:
        The ``ITensor``, with the shape of ``array``.

    Raises:
        TypeError: network is not an ``INetworkDefinition``, or array holds no numbers.
        RuntimeError: TensorRT refused the layer; its log has the reason.
    """
    check_network(network)
    return NativeLayers(network, name).constant(as_array(array, "array"), dtype, "constant", keeps_type=True)


def configure_builder(config: Any, network: Any) -> None:
    """Set the flags of an ``IBuilderConfig`` that the layers of a finished network need, and no others.

    In a network that is not strongly typed these are ``FP16`` and ``OBEY_PRECISION_CONSTRAINTS``; ``BF16`` where the
    network has a bfloat16 tensor, since with the flag other layers might be computed in bfloat16 too; and ``INT8``
    where it has an int8 tensor, since with the flag TensorRT asks for scales of the other tensors. A strongly typed
    network needs none: the types of its tensors are the types that it computes in.

    Args:
        config: ``IBuilderConfig`` whose flags are set.
        network: ``INetworkDefinition`` with all its layers.
    """
    if is_strongly_typed(network):
        return
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    outputs = [layer.get_output(i) for layer in layers for i in range(layer.num_outputs)]
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    flags = ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
    if hasattr(trt, "bfloat16") and any(tensor.dtype == trt.bfloat16 for tensor in inputs + outputs):
        flags.append("BF16")
    if any(tensor.dtype == trt.int8 or tensor.dynamic_range is not None for tensor in outputs):
        flags.append("INT8")
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
