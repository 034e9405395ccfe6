"""Attention whose result is quantized where it is written, against the same attention without that, and float64."""

import pytest
import torch

from qwen_plugins import attention
from tests.qwen_plugins.decoder_reference import Case
from tests.qwen_plugins.norm_reference import EXTREME_SCALES, LIMITS
from tests.qwen_plugins.test_attention import QKV, TOLERANCE, arguments, inputs_of, make_case

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANT_DTYPES = [torch.int8, torch.float8_e4m3fn]
SMALLEST_HALF_ULP = 2.0**-25  # of float16
HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check_codes(codes: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor | float) -> None:
    """Check that codes are those of values which are at most `error` from these, saturating."""
    low = -128 if codes.dtype == torch.int8 else -448
    exact = (values.double() / scale.double()).clamp(low, LIMITS[codes.dtype])
    step = torch.full_like(exact, 1.0)
    if codes.dtype == torch.float8_e4m3fn:
        step = 2.0 ** (torch.floor(torch.log2(exact.abs().clamp(min=2.0**-6))) - 3)
    # A value just below a power of two may be rounded in the wider steps above it.
    allowed = step / 2 * (1 + 1e-5) + (error / scale.double()) * 2
    assert bool(((codes.double() - exact).abs() <= allowed).all())


def scale_of(context: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a scale with which some values saturate."""
    return (context.abs().amax().float() / LIMITS[dtype] * 0.8).reshape(1)


def check(attend, dtype: torch.dtype, exact: torch.Tensor | None = None) -> None:
    """Check `attend` with a quantized result, in all types, against its own result and the exact one."""
    plain = attend()
    for quant_dtype in QUANT_DTYPES:
        scale = scale_of(plain, quant_dtype)
        memory = torch.full((plain.numel() + 32,), 77, dtype=torch.uint8, device="cuda")
        out = memory[16:-16].view(quant_dtype).view(plain.shape)
        codes = attend(context_dtype=quant_dtype, context_scale=scale, out=out)
        assert codes is out
        assert bool((memory[:16] == 77).all() and (memory[-16:] == 77).all())
        rounding = plain.double().abs() * HALF_ULP[dtype] + SMALLEST_HALF_ULP
        check_codes(codes, plain, scale, rounding + 1e-7 * scale)
        if exact is not None:
            check_codes(codes, exact.to(codes.device), scale, TOLERANCE[dtype] * float(exact.abs().max()))
    assert torch.equal(attend(), plain)


def prefill(case: Case, inputs: attention.AttentionInputs):
    past = torch.tensor(case.past_lengths, dtype=torch.int32, device="cuda")
    return lambda **options: attention.prefill_attention(case.qkv, inputs, case.cu_seqlens, past, **options)


def decode(case: Case, inputs: attention.AttentionInputs):
    past = torch.tensor(case.past_lengths, dtype=torch.int32, device="cuda")
    workspace = attention.decode_attention_workspace(inputs)
    return lambda **options: attention.decode_attention(case.qkv, inputs, past, workspace, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", attention.HEAD_SIZES)
@pytest.mark.parametrize("variant", [{}, {"qk_norm": True, "part": 2}], ids=str)
def test_prefill(head_size, dtype, variant):
    past, new = [0, 70, 5, 0, 63, 0], [40, 1, 130, 300, 2, 128]
    case = make_case((6, 2), head_size, dtype, past, new, 301, variant)
    exact, _ = case.reference()
    before = case.qkv.clone()
    check(prefill(case, inputs_of(case)), dtype, exact)
    assert torch.equal(case.qkv, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", attention.HEAD_SIZES)
@pytest.mark.parametrize("heads", [(6, 6), (4, 2), (28, 4), (9, 1)], ids=str)
@pytest.mark.parametrize("max_positions", [1024, 2048, 4096])
def test_decode(head_size, dtype, heads, max_positions):
    """Sequences that are whole, split among blocks that combine through memory, and split in a cluster."""
    past_lengths = [0, 65, 513, 1000]
    case = make_case(heads, head_size, dtype, past_lengths, [1] * 4, max_positions, {})
    exact, _ = case.reference()
    check(decode(case, inputs_of(case)), dtype, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(32, 32), (28, 4)], ids=str)
def test_decoding_one_long_sequence(dtype, heads):
    case = make_case(heads, 128, dtype, [9000], [1], 10_000, {})
    exact, _ = case.reference()
    check(decode(case, inputs_of(case)), dtype, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("head_size", [80, 128])
def test_scales_of_any_size(head_size, dtype, quant_dtype):
    """Zeros stay zeros and the rest saturates or vanishes: no scale makes NaN of finite values."""
    for past, new, make_attend in (([0, 0], [1, 200], prefill), ([7, 513], [1, 1], decode)):
        case = make_case((4, 2), head_size, dtype, past, new, 1024, {})
        case.cache[:, 1, 0] = 0
        values = case.qkv.view(len(case.qkv), 8, head_size)[:, 6:]
        values[:, 0] = 0  # of the first two heads
        attend = make_attend(case, inputs_of(case))
        plain = attend().double()
        assert plain.view(-1, 4, head_size)[:, :2].eq(0).all()
        assert plain.view(-1, 4, head_size)[:, 2:].ne(0).any()
        for scale in EXTREME_SCALES:
            on_gpu = torch.tensor([scale], device="cuda")
            codes = attend(context_dtype=quant_dtype, context_scale=on_gpu).double()
            factor = min(1 / scale, torch.finfo(torch.float32).max) if scale else torch.finfo(torch.float32).max
            if scale < 1e-30:
                factor = 1e30  # all but zeros saturate
            low, high = (-128, 127) if quant_dtype == torch.int8 else (-448, 448)
            expected = (plain * factor).clamp(low, high)
            assert ((codes - expected).abs() <= (1 if quant_dtype == torch.int8 else 32)).all()
            assert codes.view(-1, 4, head_size)[:, :2].eq(0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", QUANT_DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_with_a_cache_of_8_bits(dtype, cache_dtype, head_size):
    lengths = [130, 1, 900]
    case = make_case((8, 2), head_size, dtype, [0] * 3, lengths, 1024, {})
    inputs = inputs_of(case)
    cache = torch.zeros(*case.cache.shape[:-1], head_size + 4, dtype=torch.uint8, device="cuda")
    inputs = attention.AttentionInputs(**(vars(inputs) | {"kv_cache": cache, "cache_dtype": cache_dtype}))
    check(prefill(case, inputs), dtype)
    step = make_case((8, 2), head_size, dtype, lengths, [1] * 3, 1024, {}, seed=1)
    check(decode(step, inputs), dtype)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"context_dtype": torch.int8}, ValueError, "context_dtype and context_scale must both be given"),
        ({"context_scale": torch.ones(1)}, ValueError, "context_dtype and context_scale must both be given"),
        (
            {"context_dtype": torch.float16, "context_scale": torch.ones(1)},
            TypeError,
            "context_dtype must be int8 or float8_e4m3fn, not float16",
        ),
        (
            {"context_dtype": torch.int8, "context_scale": torch.ones(2)},
            ValueError,
            "context_scale must have one element",
        ),
        (
            {"context_dtype": torch.int8, "context_scale": torch.ones(1).half()},
            TypeError,
            "context_scale must be float32",
        ),
        (
            {"context_dtype": torch.int8, "context_scale": torch.ones(1), "out": QKV[:, :256].contiguous()},
            TypeError,
            "out must be int8, not float16",
        ),
    ],
)
def test_refused_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        attention.prefill_attention(**arguments(), **changed)
    given = arguments()
    inputs = given["inputs"]
    workspace = attention.decode_attention_workspace(inputs)
    with pytest.raises(error, match=message):
        attention.decode_attention(given["qkv"], inputs, torch.zeros(2, dtype=torch.int32), workspace, **changed)
