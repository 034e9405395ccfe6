"""quantize against float64, and against float32 exactly. The same cases on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_plugins
from tests.qwen_plugins.norm_reference import EXTREME_SCALES, LIMITS, assert_quantized, divisor_of
from tests.qwen_plugins.test_rms_norm import DEVICES, DTYPES, make

QUANT_DTYPES = [torch.int8, torch.float8_e4m3fn]


def check(x, dtype, static=False):
    scale = (x.abs().amax().float() / LIMITS[dtype] * 0.7).reshape(1).clamp(min=1e-10) if static else None
    q, scales = qwen_plugins.quantize(x, dtype, scale)
    assert (q.shape, q.dtype, q.is_contiguous()) == (x.shape, dtype, True)
    if static:
        assert scales is scale
    else:
        # In float64, since PyTorch divides by a number on a GPU by a product with its reciprocal.
        exact = (x.abs().amax(-1, keepdim=True).double() / LIMITS[dtype]).float()
        assert torch.equal(scales, exact.clamp(min=torch.finfo(torch.float32).tiny))
    scaled = x.float() / scales
    assert_quantized(q, x.double() / scales.double())
    limit = LIMITS[dtype]
    exact = scaled.round().clamp(-128, 127) if dtype == torch.int8 else scaled.clamp(-limit, limit)
    assert torch.equal(q.float(), exact.to(dtype).float())  # as numbers: on a GPU the code of -0 is that of 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("columns", [1, 3, 8, 127, 128, 1000, 4096, 4100, 5120])
def test_matches_float64(device, dtype, quant_dtype, static, columns):
    check(make(9, columns, dtype=dtype, device=device), quant_dtype, static)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 133, 1025])
@pytest.mark.parametrize("columns", [64, 896, 2048, 2056, 8192, 8200, 18944, 29568, 32768, 32776, 65535])
def test_every_launch_shape_matches_float64(dtype, quant_dtype, static, rows, columns):
    check(make(min(rows, 2**24 // columns), columns, dtype=dtype, device="cuda"), quant_dtype, static)


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    quant_dtype=st.sampled_from(QUANT_DTYPES),
    shape=st.lists(st.integers(1, 5), max_size=3),
    columns=st.integers(1, 300),
    static=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_cases_on_the_cpu(dtype, quant_dtype, shape, columns, static, seed):
    torch.manual_seed(seed)
    check(make(*shape, columns, dtype=dtype, device="cpu"), quant_dtype, static)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [512, 511])
def test_ties_round_to_even(device, columns):
    x = torch.arange(columns, device=device).half() / 2 - 128
    q, _ = qwen_plugins.quantize(x, torch.int8, torch.ones(1, device=device))
    assert torch.equal(q, x.round().clamp(-128, 127).to(torch.int8))
    q, _ = qwen_plugins.quantize(x, torch.float8_e4m3fn, torch.full((1,), 0.125, device=device))
    assert torch.equal(q.float(), (x.float() * 8).clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("columns", [64, 65])
def test_zeros_nan_and_infinity(device, dtype, quant_dtype, columns):
    x = make(4, columns, dtype=dtype, device=device)
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 5] = -torch.inf
    q, scales = qwen_plugins.quantize(x, quant_dtype)
    assert q[0].float().abs().max() == LIMITS[quant_dtype]
    assert int(q[1].float().count_nonzero()) == 0
    assert scales[1].item() == torch.finfo(torch.float32).tiny
    assert scales[2:].isnan().all()
    expected = torch.zeros(2, columns, device=device)
    if quant_dtype == torch.float8_e4m3fn:
        expected[0, 3] = expected[1, 5] = torch.nan
    assert torch.equal(q[2:].float().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    q, _ = qwen_plugins.quantize(x, quant_dtype, torch.ones(1, device=device))
    assert q[3, 5].float() == (-128 if quant_dtype == torch.int8 else -448)
    assert q[2, 3].float().isnan() if quant_dtype == torch.float8_e4m3fn else q[2, 3] == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("largest", [1e-38, 3e-41, 1e38])
def test_magnitudes_at_the_ends_of_the_range(device, quant_dtype, largest):
    x = torch.linspace(-largest, largest, 127, device=device)
    q, scales = qwen_plugins.quantize(x.bfloat16(), quant_dtype)
    assert scales.item() >= torch.finfo(torch.float32).tiny
    assert_quantized(q, x.bfloat16().double() / scales.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
def test_small_rows_round_correctly(device, dtype, quant_dtype):
    for size in (1e-20, 1e-30, 1e-35):
        check(make(64, 512, dtype=torch.float32, device=device).mul(size).to(dtype), quant_dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("scale", EXTREME_SCALES)
def test_static_scales_of_any_size(device, dtype, quant_dtype, scale):
    divisor, largest = divisor_of(scale), torch.finfo(dtype).max
    around = torch.linspace(-500, 500, 1001, dtype=torch.float64) * min(divisor, 1e36)
    others = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1e-20, 3e-3, -7.0, 6e4, -1e20, largest, -largest])
    x = torch.cat([around, others.double(), torch.zeros(12, dtype=torch.float64)]).clamp(-largest, largest).to(dtype)
    expected = x.float() / torch.tensor(divisor)  # on a CPU, where it is correctly rounded
    if quant_dtype == torch.int8:
        expected = expected.round().clamp(-128, 127)
    expected = expected.clamp(-448, 448).to(quant_dtype).float()
    for columns in (1024, 1023):  # in packs, and one by one
        q, _ = qwen_plugins.quantize(x[:columns].to(device), quant_dtype, torch.tensor([scale], device=device))
        assert torch.equal(q.float().cpu(), expected[:columns])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_rows_and_misaligned_views(device):
    heads = make(6, 5, 8 * 64, dtype=torch.float16, device=device).unflatten(-1, (8, 64))
    check(heads[:, :, 2:6], torch.int8)
    check(heads[::2, 1:, ::3], torch.int8)
    check(heads.transpose(0, 2), torch.float8_e4m3fn, static=True)
    storage = make(4 * 512 + 3, dtype=torch.float16, device=device)
    check(storage[3:].view(4, 512), torch.int8)
    check(storage[:512].expand(3, 512), torch.int8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(device, shape):
    q, scales = qwen_plugins.quantize(torch.empty(shape, device=device), torch.int8)
    assert (q.shape, scales.shape) == (shape, (*shape[:-1], 1))


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.int8), TypeError, "x must be a torch.Tensor"),
        ((X.double(), torch.int8), TypeError, "x must be float16, bfloat16 or float32"),
        ((X[0, 0], torch.int8), ValueError, "last dimension of at least 1"),
        ((X.T, torch.int8), ValueError, "last dimension of x must be contiguous"),
        ((X, torch.float16), TypeError, "dtype must be int8 or float8_e4m3fn, not float16"),
        ((X, "int8"), TypeError, "dtype must be torch.int8"),
        ((X, torch.int8, 0.5), TypeError, "scale must be a torch.Tensor"),
        ((X, torch.int8, torch.ones(2)), ValueError, "scale must have one element"),
        ((X, torch.int8, torch.ones(1).half()), TypeError, "scale must be float32"),
        ((X.clone().requires_grad_(), torch.int8), ValueError, "requires gradients"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        qwen_plugins.quantize(*arguments)
