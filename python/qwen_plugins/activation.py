"""Compute the activation function SwiGLU, without its GEMMs, for PyTorch tensors on an NVIDIA GPU.

`qwen_plugins.gemm` with ``activation="swiglu"`` computes it together with the GEMM of gate and up.
"""

from __future__ import annotations

from torch import Tensor

from qwen_plugins import launch
from qwen_plugins._arguments import (
    CurrentDevice,
    check,
    check_gpu,
    check_output,
    check_rows,
    check_tensor,
    data_type,
)

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute silu(gate) · up in float32, on the current stream.

    The function works inside CUDA graph capture, and computes no gradients.

    Args:
        gate_up: [rows, 2 · size], float16, bfloat16 or float32: the gate, then up. Rows may be strided, their elements
            must be contiguous.
        out: where the result is written, contiguous; None: in new memory.

    Returns:
        [rows, size], in the type of gate_up.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    check_tensor("gate_up", gate_up)
    check_rows("gate_up", gate_up)
    rows, columns = gate_up.shape
    check(columns % 2 == 0, f"gate_up must have an even number of columns, not {columns}")
    size = columns // 2
    if out is not None:
        check_output(out, (rows, size), gate_up)
    check_gpu("gate_up", gate_up)
    if out is None:
        out = gate_up.new_empty(rows, size)
    with CurrentDevice(gate_up) as stream:
        launch.swiglu(
            gate_up=gate_up.data_ptr(),
            y=out.data_ptr(),
            gate_up_row_stride=gate_up.stride(0),
            rows=rows,
            size=size,
            dtype=data_type(gate_up.dtype),
            stream=stream,
        )
    return out
