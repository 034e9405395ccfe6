"""Gather the rows of an embedding by token, for PyTorch tensors on an NVIDIA GPU."""

from __future__ import annotations

from torch import Tensor

from qwen_plugins import launch
from qwen_plugins._arguments import (
    CurrentDevice,
    check_contiguous,
    check_gpu,
    check_int32,
    check_is_tensor,
    check_output,
    check_rows,
    check_tensor,
    data_type,
)

__all__ = ["gather_rows"]


def gather_rows(table: Tensor, ids: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return table[ids]; an id outside of the table gives a row of zeros.

    The kernel runs on the current stream. The function works inside CUDA graph capture, and computes no gradients.

    Args:
        table: [rows, row_size], contiguous, float16, bfloat16 or float32.
        ids: int32 [n], on the device of the table.
        out: where the result is written, contiguous; None: in new memory.

    Returns:
        [n, row_size], in the type of the table.

    Raises:
        TypeError, ValueError: for an argument that does not fit, before anything is written.
    """
    check_tensor("table", table)
    check_rows("table", table)
    check_contiguous("table", table)
    check_is_tensor("ids", ids)
    shape = (ids.numel(), table.shape[1])
    check_int32("ids", ids, shape[0], table)
    if out is not None:
        check_output(out, shape, table)
    check_gpu("table", table)
    if out is None:
        out = table.new_empty(shape)
    if out.numel() == 0:
        return out
    with CurrentDevice(table) as stream:
        launch.gather_rows(
            table=table.data_ptr(),
            ids=ids.data_ptr(),
            y=out.data_ptr(),
            table_rows=len(table),
            row_size=shape[1],
            rows=shape[0],
            dtype=data_type(table.dtype),
            stream=stream,
        )
    return out
