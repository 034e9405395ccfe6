"""Gathering rows against indexing by PyTorch; arguments that are refused."""

import math

import pytest
import torch

from qwen_plugins import launch
from qwen_plugins.embedding import gather_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_size", [1, 3, 8, 100, 4096, 5000])
@pytest.mark.parametrize("rows", [0, 1, 5, 3000])
def test_gather_rows(rows, row_size, dtype):
    table = torch.randn(50, row_size, device="cuda").to(dtype)
    ids = torch.randint(-3, 53, (rows,), dtype=torch.int32, device="cuda")
    known = ((ids >= 0) & (ids < 50))[:, None]
    expected = torch.where(known, table[ids.long().clamp(0, 49)], torch.zeros_like(table[:1]))
    out = torch.full((rows, row_size), math.nan, dtype=dtype, device="cuda")
    assert gather_rows(table, ids, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_gather_rows_at_odd_addresses():
    memory = torch.randn(10 * 64 + 1, device="cuda").half()
    table = memory[1:].view(10, 64)
    ids = torch.tensor([3, 3, 9, 0], dtype=torch.int32, device="cuda")
    assert torch.equal(gather_rows(table, ids), table[ids.long()])


@pytest.mark.gpu
@pytest.mark.parametrize("row_size", [1, 2, 6, 12, 64, 3584])
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_codes(row_size, shift):
    memory = torch.randint(-128, 128, (10 * row_size + 1,), dtype=torch.int8, device="cuda")
    table = memory[shift : shift + 10 * row_size].view(10, row_size)
    ids = torch.tensor([3, 3, 9, 0, -1], dtype=torch.int32, device="cuda")
    out = torch.full((5, row_size), 77, dtype=torch.int8, device="cuda")
    launch.gather_rows(
        table=table.data_ptr(),
        ids=ids.data_ptr(),
        y=out.data_ptr(),
        table_rows=10,
        row_size=row_size,
        rows=5,
        dtype=launch.DataType.int8,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    assert torch.equal(out[:4], table[ids[:4].long()])
    assert not out[4].any()


TABLE, IDS = torch.zeros(5, 8), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"table": TABLE.int()}, TypeError, "table must be float16, bfloat16 or float32, not int32"),
        ({"table": TABLE[0]}, ValueError, "table must have 2 dimensions, not 1"),
        ({"table": TABLE[:, :4]}, ValueError, r"table must be contiguous, but its strides are \(8, 1\)"),
        ({"table": TABLE.clone().requires_grad_()}, ValueError, "table requires gradients"),
        ({"ids": [0]}, TypeError, r"ids must be a torch\.Tensor, not list"),
        ({"ids": IDS.long()}, TypeError, "ids must be int32, not int64"),
        ({"ids": IDS[None]}, ValueError, r"ids must have the shape \(3,\), not \(1, 3\)"),
        ({"ids": torch.zeros(6, dtype=torch.int32)[::2]}, ValueError, "ids must be contiguous"),
        ({"ids": IDS.to("meta")}, ValueError, "ids must be on the device of the first argument, cpu, not on meta"),
        ({"out": torch.zeros(3, 7)}, ValueError, r"out must have the shape \(3, 8\), not \(3, 7\)"),
        ({"out": torch.zeros(3, 8).half()}, TypeError, "out must be float32, not float16"),
        ({}, ValueError, "table must be on an NVIDIA GPU, not on cpu"),
    ],
)
def test_refused_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        gather_rows(**({"table": TABLE, "ids": IDS} | changed))
