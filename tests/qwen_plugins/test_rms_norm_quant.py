"""rms_norm_quant against float64. The same cases on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_plugins
from tests.qwen_plugins.norm_reference import EXTREME_SCALES, LIMITS, assert_quantized, divisor_of, reference
from tests.qwen_plugins.test_rms_norm import DEVICES, DTYPES, make, make_weight

QUANT_DTYPES = [torch.int8, torch.float8_e4m3fn]


def check(x, weight, quant_dtype, *, static=False, smoothing=None, residual=None, unit_offset=False, eps=1e-6):
    y, h = reference(x, weight, eps, residual=residual, unit_offset=unit_offset)
    if smoothing is not None:
        y = y / smoothing.double()
    scale = None
    if static:
        # Some values saturate.
        scale = (y.abs().amax() / LIMITS[quant_dtype] * 0.7).float().reshape(1).clamp(min=1e-10)
    result = qwen_plugins.rms_norm_quant(
        x,
        weight,
        eps,
        quant_dtype=quant_dtype,
        scale=scale,
        smoothing=smoothing,
        residual=residual,
        unit_offset=unit_offset,
    )
    outputs = list(result) if isinstance(result, tuple) else [result]
    if residual is not None:
        assert torch.equal(outputs.pop(), h)
    q = outputs[0]
    assert q.dtype == quant_dtype
    assert q.shape == x.shape
    if not static:
        scale = outputs[1]
        exact = y.abs().amax(-1, keepdim=True) / LIMITS[quant_dtype]
        assert scale.shape == (*x.shape[:-1], 1)
        assert scale.dtype == torch.float32
        assert torch.allclose(scale.double(), exact, rtol=1e-6, atol=2e-38)
        assert_quantized(q, y / exact.clamp(min=1e-300))
    else:
        assert_quantized(q, y / scale.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("hidden_size", [1, 3, 8, 127, 128, 1000, 4096, 4100, 5120])
def test_matches_float64(device, dtype, quant_dtype, static, hidden_size):
    x = make(9, hidden_size, dtype=dtype, device=device)
    weight = make_weight(hidden_size, dtype, device)
    residual = make(9, hidden_size, dtype=dtype, device=device)
    smoothing = make_weight(hidden_size, dtype, device).abs() + 0.1
    check(x, weight, quant_dtype, static=static)
    check(x, weight, quant_dtype, static=static, residual=residual)
    check(x, weight, quant_dtype, static=static, smoothing=smoothing)
    check(
        x, weight.float(), quant_dtype, static=static, smoothing=smoothing.float(), residual=residual, unit_offset=True
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 529, 2048])
@pytest.mark.parametrize("hidden_size", [896, 2048, 4096, 8192, 24576, 32776, 65535, 131072])
def test_every_launch_shape_matches_float64(dtype, quant_dtype, tokens, hidden_size):
    tokens = min(tokens, 2**24 // hidden_size)
    x = make(tokens, hidden_size, dtype=dtype, device="cuda")
    weight = make_weight(hidden_size, dtype, "cuda")
    check(x, weight, quant_dtype)
    check(x, weight, quant_dtype, residual=make(tokens, hidden_size, dtype=dtype, device="cuda"))


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    quant_dtype=st.sampled_from(QUANT_DTYPES),
    shape=st.lists(st.integers(1, 5), max_size=3),
    hidden_size=st.integers(1, 300),
    with_residual=st.booleans(),
    with_smoothing=st.booleans(),
    static=st.booleans(),
    unit_offset=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_cases_on_the_cpu(
    dtype, quant_dtype, shape, hidden_size, with_residual, with_smoothing, static, unit_offset, seed
):
    torch.manual_seed(seed)
    check(
        make(*shape, hidden_size, dtype=dtype, device="cpu"),
        make_weight(hidden_size, dtype, "cpu"),
        quant_dtype,
        static=static,
        smoothing=make_weight(hidden_size, torch.float32, "cpu").abs() + 0.1 if with_smoothing else None,
        residual=make(*shape, hidden_size, dtype=dtype, device="cpu") if with_residual else None,
        unit_offset=unit_offset,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("hidden_size", [64, 65])
def test_zeros_nan_and_infinity(device, quant_dtype, hidden_size):
    x = make(4, hidden_size, dtype=torch.float16, device=device)
    x[1] = 0
    x[2, 3] = torch.nan
    x[3, 5] = torch.inf
    weight = torch.ones(hidden_size, dtype=torch.float16, device=device)
    q, scales = qwen_plugins.rms_norm_quant(x, weight, quant_dtype=quant_dtype)
    assert q[0].float().abs().max() == LIMITS[quant_dtype]
    assert int(q[1].float().count_nonzero()) == 0
    assert scales[1].item() == torch.finfo(torch.float32).tiny
    assert scales[2:].isnan().all()
    if quant_dtype == torch.int8:
        assert int(q[2].count_nonzero()) == 0
        assert int(q[3].count_nonzero()) == 0
    else:
        assert q[2].float().isnan().all()
        assert q[3, 5].float().isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_static_quantization_saturates(device):
    x = torch.tensor([[3.0, -3.0, 0.0, 1.0]], device=device)
    scale = torch.tensor(1e-3, device=device)
    weight = torch.ones(4, device=device)
    assert qwen_plugins.rms_norm_quant(x, weight, scale=scale).tolist() == [[127, -128, 0, 127]]
    q = qwen_plugins.rms_norm_quant(x, weight, scale=scale, quant_dtype=torch.float8_e4m3fn)
    assert q.float().tolist() == [[448, -448, 0, 448]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("scale", EXTREME_SCALES)
def test_static_scales_of_any_size(device, dtype, quant_dtype, scale):
    divisor = divisor_of(scale)
    for hidden_size in (64, 65, 32776):
        x = make(3, hidden_size, dtype=dtype, device=device)
        x[:, ::3] = 0
        near_the_scale = 100 * divisor if 1e-37 < 100 * divisor < 1e36 else 1.0
        for size in (1.0, near_the_scale):
            weight = make_weight(hidden_size, torch.float32, device) * size
            y, _ = reference(x, weight, 1e-6)
            q = qwen_plugins.rms_norm_quant(
                x, weight, quant_dtype=quant_dtype, scale=torch.tensor([scale], device=device)
            )
            assert_quantized(q, y / divisor)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_rows_and_misaligned_views(device):
    heads = make(6, 5, 8 * 64, dtype=torch.float16, device=device).unflatten(-1, (8, 64))
    weight = make_weight(64, torch.float16, device)
    check(heads[:, :, 2:6], weight, torch.int8)
    check(heads[::2, 1:, ::3], weight, torch.int8)
    check(heads.transpose(0, 2), weight, torch.float8_e4m3fn, static=True)
    storage = make(4 * 512 + 3, dtype=torch.float16, device=device)
    check(storage[3:].view(4, 512), make_weight(512, torch.float16, device), torch.int8)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows(device):
    x = torch.empty(0, 16, device=device)
    q, scales, h = qwen_plugins.rms_norm_quant(x, torch.ones(16, device=device), residual=x)
    assert (q.shape, scales.shape, h.shape) == ((0, 16), (0, 1), (0, 16))


X = torch.zeros(2, 8)
WEIGHT = torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"quant_dtype": torch.int4 if hasattr(torch, "int4") else torch.int16},
            TypeError,
            "quant_dtype must be int8 or",
        ),
        ({"scale": torch.ones(2)}, ValueError, r"scale must have one element, but its shape is \(2,\)"),
        ({"scale": torch.ones(1).double()}, TypeError, "scale must be float32, not float64"),
        ({"smoothing": torch.ones(7)}, ValueError, r"smoothing must have the shape \(8,\), not \(7,\)"),
        ({"smoothing": torch.ones(8).half()}, TypeError, "smoothing must be float32, not float16"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"weight": torch.ones(9)}, ValueError, "weight must have the shape"),
    ],
)
def test_errors(arguments, error, message):
    given = {"x": X, "weight": WEIGHT} | arguments
    with pytest.raises(error, match=message):
        qwen_plugins.rms_norm_quant(given.pop("x"), given.pop("weight"), **given)
