"""SwiGLU against float64; arguments that are refused."""

import pytest
import torch

from qwen_plugins.activation import swiglu
from tests.qwen_plugins.decoder_reference import relative_error
from tests.qwen_plugins.decoder_reference import swiglu as exact_swiglu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 11008), (3, 8), (7, 1), (64, 172), (5, 333), (2000, 96), (0, 16)])
def test_swiglu(shape, dtype):
    rows, size = shape
    gate_up = (torch.randn(rows, 2 * size, device="cuda") * 4).to(dtype)
    y = swiglu(gate_up)
    assert y.shape == shape
    if rows:
        assert relative_error(y, exact_swiglu(gate_up)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 8])
def test_swiglu_of_views(dtype, shift):
    """Rows of a wider matrix, at addresses that packs do not fit."""
    wide = torch.randn(9, 200, device="cuda").to(dtype)
    view = wide[:, shift : shift + 128]
    assert relative_error(swiglu(view), exact_swiglu(view)) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_swiglu_of_one_row_with_any_stride():
    row = torch.randn(26, 1, device="cuda").half().t()  # its stride is 1, and is not used
    assert relative_error(swiglu(row), exact_swiglu(row)) < TOLERANCE[torch.float16]


@pytest.mark.gpu
def test_swiglu_of_extremes():
    gate = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 6e4, float("inf")], device="cuda", dtype=torch.float16)
    y = swiglu(torch.cat([gate, torch.ones_like(gate)])[None])
    assert not y.isnan().any()
    torch.testing.assert_close(
        y[0, :7].double().cpu(),
        exact_swiglu(torch.cat([gate[:7], torch.ones_like(gate[:7])])[None])[0].cpu(),
        atol=1e-3,
        rtol=2e-3,
    )


GATE_UP = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("gate_up", "out", "error", "message"),
    [
        ([1.0], None, TypeError, r"gate_up must be a torch\.Tensor, not list"),
        (GATE_UP.double(), None, TypeError, "gate_up must be float16, bfloat16 or float32, not float64"),
        (GATE_UP[0], None, ValueError, "gate_up must have 2 dimensions, not 1"),
        (GATE_UP[:, 1:], None, ValueError, "gate_up must have an even number of columns, not 7"),
        (GATE_UP.t(), None, ValueError, "last dimension of gate_up must be contiguous"),
        (GATE_UP.clone().requires_grad_(), None, ValueError, "gate_up requires gradients"),
        (GATE_UP, GATE_UP, ValueError, r"out must have the shape \(3, 4\), not \(3, 8\)"),
        (GATE_UP, GATE_UP[:, :4], ValueError, "out must be contiguous"),
        (GATE_UP, torch.zeros(3, 4).half(), TypeError, "out must be float32, not float16"),
        (GATE_UP, torch.zeros(3, 4, device="meta"), ValueError, "out must be on the device of the first argument, cpu"),
        (GATE_UP, None, ValueError, "gate_up must be on an NVIDIA GPU, not on cpu"),
    ],
)
def test_refused_arguments(gate_up, out, error, message):
    with pytest.raises(error, match=message):
        swiglu(gate_up, out=out)
