"""rms_norm against float64, PyTorch and transformers; layouts; errors. The same cases on the CPU and on the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_plugins
from tests.qwen_plugins.norm_reference import assert_within_one_ulp, reference

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make(*shape: int, dtype: torch.dtype, device: str, magnitude: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * magnitude).to(dtype).to(device)


def make_weight(hidden_size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return (1 + 0.2 * torch.randn(hidden_size, dtype=torch.float64)).to(dtype).to(device)


def skip_unless_free(gibibytes: int) -> None:
    torch.cuda.empty_cache()  # what earlier tests have let go
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory; {free:.0f} are free")


def check(x, weight, eps=1e-6, residual=None, unit_offset=False):
    expected, h = reference(x, weight, eps, residual=residual, unit_offset=unit_offset)
    result = qwen_plugins.rms_norm(x, weight, eps, residual=residual, unit_offset=unit_offset)
    if residual is None:
        assert_within_one_ulp(result, expected)
        return
    y, actual_h = result
    assert torch.equal(actual_h, h)
    assert_within_one_ulp(y, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("hidden_size", [1, 2, 7, 8, 64, 127, 128, 256, 264, 1000, 2048, 3584, 4096, 4100, 5120, 8192])
def test_matches_float64(device, dtype, with_residual, hidden_size):
    x = make(3, 5, hidden_size, dtype=dtype, device=device)
    residual = make(3, 5, hidden_size, dtype=dtype, device=device) if with_residual else None
    check(x, make_weight(hidden_size, dtype, device), residual=residual)
    check(x, make_weight(hidden_size, torch.float32, device), residual=residual, unit_offset=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("hidden_size", [16384, 24576, 32768, 32776, 65535, 65536, 131072, 200001])
def test_long_rows_match_float64(dtype, with_residual, hidden_size):
    x = make(5, hidden_size, dtype=dtype, device="cuda")
    residual = make(5, hidden_size, dtype=dtype, device="cuda") if with_residual else None
    for weight_dtype in {dtype, torch.float32}:
        check(x, make_weight(hidden_size, weight_dtype, "cuda"), residual=residual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 31, 64, 133, 528, 529, 1024, 2048, 8192])
@pytest.mark.parametrize("hidden_size", [128, 896, 2048, 4096, 5120, 8192])
def test_every_launch_shape_matches_float64(dtype, tokens, hidden_size):
    x = make(tokens, hidden_size, dtype=dtype, device="cuda")
    residual = make(tokens, hidden_size, dtype=dtype, device="cuda")
    weight = make_weight(hidden_size, dtype, "cuda")
    check(x, weight)
    check(x, weight, residual=residual)


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=3),
    hidden_size=st.integers(1, 300),
    eps=st.sampled_from([1e-12, 1e-6, 1e-5, 0.1]),
    magnitude=st.sampled_from([1e-4, 1.0, 100.0]),
    weight_is_float32=st.booleans(),
    with_residual=st.booleans(),
    unit_offset=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_cases_on_the_cpu(
    dtype, shape, hidden_size, eps, magnitude, weight_is_float32, with_residual, unit_offset, seed
):
    torch.manual_seed(seed)
    x = make(*shape, hidden_size, dtype=dtype, device="cpu", magnitude=magnitude)
    residual = make(*shape, hidden_size, dtype=dtype, device="cpu", magnitude=magnitude) if with_residual else None
    weight = make_weight(hidden_size, torch.float32 if weight_is_float32 else dtype, "cpu")
    check(x, weight, eps, residual, unit_offset)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_any_layout(device, dtype):
    packed = make(6, 3, (4 + 2 + 2) * 64, dtype=dtype, device=device)
    heads = packed.unflatten(-1, (8, 64))
    weight = make_weight(64, dtype, device)
    check(heads[:, :, :4], weight)  # q inside a packed qkv
    check(heads[:, :, 4:6].transpose(0, 1), weight)  # k, tokens first
    check(heads[::2, 1:, ::3], weight)  # three levels of rows that can't be merged
    check(heads.permute(2, 0, 1, 3)[1:7:2], weight, residual=make(3, 6, 3, 64, dtype=dtype, device=device))
    check(heads[0, 0, 0], weight)  # no leading dimension at all
    check(make(1, 64, dtype=dtype, device=device).expand(5, 64), weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_misaligned_views(device, dtype, offset):
    hidden_size = 4096
    storage = make(7 * hidden_size + offset, dtype=dtype, device=device)
    x = storage[offset:].view(7, hidden_size)
    weight = make_weight(hidden_size + offset, dtype, device)[offset:]
    check(x, weight)
    check(x, weight, residual=make(7, hidden_size, dtype=dtype, device=device))
    check(make(7, hidden_size, dtype=dtype, device=device), weight)
    out = torch.full((7 * hidden_size + offset,), torch.nan, dtype=dtype, device=device)
    qwen_plugins.rms_norm(x, weight, out=out[offset:].view(7, hidden_size))
    assert out[:offset].isnan().all()
    assert_within_one_ulp(out[offset:].view(7, hidden_size), reference(x, weight, 1e-6)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 7)])
def test_zero_rows(device, shape):
    x = torch.empty(*shape, 16, device=device)
    y, h = qwen_plugins.rms_norm(x, torch.ones(16, device=device), residual=x)
    assert y.shape == h.shape == x.shape


@pytest.mark.parametrize("device", DEVICES)
def test_writes_into_out_and_nothing_else(device):
    x = make(4, 96, dtype=torch.float16, device=device)
    weight = make_weight(96, torch.float16, device)
    buffer = torch.full((6, 100), torch.nan, dtype=torch.float16, device=device)
    out = buffer[1:5, 2:98]
    assert qwen_plugins.rms_norm(x, weight, out=out) is out
    assert_within_one_ulp(out, reference(x, weight, 1e-6)[0])
    assert int(buffer.isnan().sum()) == buffer.numel() - out.numel()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden_size", [96, 97])
def test_in_place(device, hidden_size):
    x = make(5, hidden_size, dtype=torch.bfloat16, device=device)
    residual = make(5, hidden_size, dtype=torch.bfloat16, device=device)
    weight = make_weight(hidden_size, torch.bfloat16, device)
    expected, h = reference(x, weight, 1e-6, residual=residual)
    y, new_residual = qwen_plugins.rms_norm(x, weight, residual=residual, out=(x, residual))
    assert y is x
    assert new_residual is residual
    assert torch.equal(residual, h)
    assert_within_one_ulp(x, expected)

    qkv = make(5, 3 * hidden_size, dtype=torch.bfloat16, device=device)
    heads = qkv.unflatten(-1, (3, hidden_size))
    untouched = heads[:, 2].clone()
    expected = reference(heads[:, :2].clone(), weight, 1e-6)[0]
    qwen_plugins.rms_norm(heads[:, :2], weight, out=heads[:, :2])
    assert_within_one_ulp(heads[:, :2], expected)
    assert torch.equal(heads[:, 2], untouched)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_infinity(device):
    x = make(5, 64, dtype=torch.float32, device=device)
    x[1, 3] = torch.nan
    x[2, 5] = torch.inf
    x[3, 7] = -torch.inf
    x[4] = 0
    y = qwen_plugins.rms_norm(x, torch.ones(64, device=device))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    for row, column in ((2, 5), (3, 7)):
        assert y[row, column].isnan()
        assert int(y[row].count_nonzero()) == 1
    assert torch.equal(y[4], torch.zeros(64, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_before_weight_is_what_transformers_computes(device, dtype):
    modeling_qwen2 = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    module = modeling_qwen2.Qwen2RMSNorm(512, eps=1e-6).to(device=device, dtype=dtype)
    x = make(64, 512, dtype=dtype, device=device)
    with torch.no_grad():
        module.weight.copy_(make_weight(512, dtype, device))
        expected = module(x)
        y = qwen_plugins.rms_norm(x, module.weight, 1e-6, round_before_weight=True)
    # Its mean is float32 too, but in another order: a few results in ten thousand round to the other neighbour. For
    # float32 itself that order is the difference, and ours is the more exact.
    difference = (y.double() - expected.double()).abs()
    ulps = 8 if dtype == torch.float32 else 2
    assert (difference <= ulps * torch.finfo(dtype).eps * expected.double().abs()).all()
    assert dtype == torch.float32 or (difference > 0).float().mean() < 1e-3


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    skip_unless_free(gibibytes=20)
    x = torch.ones(2**20 + 3, 2049, dtype=torch.float16, device="cuda")
    x[-1] = 3
    x[-1, -1] = -3
    y = qwen_plugins.rms_norm(x, torch.ones(2049, dtype=torch.float16, device="cuda"))
    assert torch.equal(y[-1], torch.sign(x[-1]))
    assert bool((y == torch.sign(x)).all())


@pytest.mark.gpu
def test_more_rows_of_both_levels_than_one_grid_has():
    skip_unless_free(gibibytes=40)
    packed = torch.randn(70000, 70001 * 2, device="cuda", dtype=torch.float16)
    rows = packed.unflatten(-1, (70001, 2))[:, :, :1]  # rows of one element, every other one
    y = qwen_plugins.rms_norm(rows, torch.ones(1, device="cuda", dtype=torch.float16), eps=1e-20)
    assert bool((y[-1] == torch.sign(rows[-1])).all())
    assert bool((y[:, -1] == torch.sign(rows[:, -1])).all())


@pytest.mark.gpu
def test_cuda_graph_replays_on_new_input():
    x = make(8, 512, dtype=torch.float16, device="cuda")
    weight = make_weight(512, torch.float16, "cuda")
    qwen_plugins.rms_norm(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(20):  # each reads what the one before wrote, launched before that has finished
            y, h = qwen_plugins.rms_norm(y, weight, residual=x)
    x.copy_(make(8, 512, dtype=torch.float16, device="cuda"))
    graph.replay()
    expected = x
    for _ in range(20):
        expected, expected_h = qwen_plugins.rms_norm(expected, weight, residual=x)
        torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert torch.equal(h, expected_h)


@pytest.mark.gpu
def test_waits_for_the_kernel_that_makes_its_inputs():
    expected_weight = torch.linspace(0.5, 1.5, 8192, device="cuda", dtype=torch.float32)
    for _ in range(50):
        x = torch.randn(64, 8192, device="cuda")
        weight = torch.full((8192,), torch.nan, device="cuda")
        weight.copy_(expected_weight)  # the kernel just before: the weight must not be read ahead of it
        y = qwen_plugins.rms_norm(x, weight)
        assert_within_one_ulp(y, reference(x, expected_weight, 1e-6)[0])


@pytest.mark.gpu
def test_current_stream_and_other_devices():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
        weight = torch.ones(4096, device="cuda", dtype=torch.float16)
        y = qwen_plugins.rms_norm(x, weight)
    stream.synchronize()
    assert_within_one_ulp(y, reference(x, weight, 1e-6)[0])
    if torch.cuda.device_count() > 1:
        other = x.to("cuda:1")
        check(other, weight.to("cuda:1"))
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_allocates_its_outputs_and_nothing_else():
    x = torch.randn(64, 4096, device="cuda", dtype=torch.float16)
    weight = torch.ones(4096, device="cuda", dtype=torch.float16)
    out = torch.empty_like(x)
    qwen_plugins.rms_norm(x, weight, out=out)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    qwen_plugins.rms_norm(x, weight, out=out)
    assert torch.cuda.max_memory_allocated() == before


X = torch.zeros(2, 8)
WEIGHT = torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x must be float16, bfloat16 or float32, not int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"shape is \(\)"),
        ({"x": torch.zeros(2, 0), "weight": torch.zeros(0)}, ValueError, "last dimension of at least 1"),
        (
            {"x": torch.zeros(8, 2).t()},
            ValueError,
            r"last dimension of x must be contiguous, but its strides are \(1, 2\)",
        ),
        ({"x": X.clone().requires_grad_()}, ValueError, "torch.no_grad"),
        ({"weight": torch.ones(7)}, ValueError, r"weight must have the shape \(8,\), not \(7,\)"),
        ({"weight": torch.ones(1, 8)}, ValueError, r"weight must have the shape \(8,\), not \(1, 8\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be float32, not float16"),
        ({"weight": torch.ones(16)[::2]}, ValueError, "last dimension of weight must be contiguous"),
        ({"eps": 0.0}, ValueError, "eps must be a finite number above 0 that float32 can hold, not 0.0"),
        ({"eps": -1e-6}, ValueError, "eps must be"),
        ({"eps": float("nan")}, ValueError, "eps must be"),
        ({"eps": 1e-50}, ValueError, "above 0 that float32 can hold, not 1e-50"),
        ({"eps": 1e300}, ValueError, "eps must be"),
        ({"residual": torch.zeros(2, 7)}, ValueError, r"residual must have the shape \(2, 8\), not \(2, 7\)"),
        ({"residual": X.half()}, TypeError, "residual must be float32 like x, not float16"),
        (
            {"residual": X.to("meta")},
            ValueError,
            "residual must be on the device of the first argument, cpu, not on meta",
        ),
        ({"out": torch.zeros(8, 2)}, ValueError, r"out must have the shape \(2, 8\), not \(8, 2\)"),
        ({"out": torch.zeros(1, 8).expand(2, 8)}, ValueError, "out must not overlap itself"),
        ({"out": (X, X)}, TypeError, "out must be a torch.Tensor where there is no residual, not tuple"),
        ({"out": X.clone(), "residual": X}, TypeError, r"out must be a tuple \(y, h\)"),
    ],
)
def test_errors(arguments, error, message):
    given = {"x": X, "weight": WEIGHT} | arguments
    with pytest.raises(error, match=message):
        qwen_plugins.rms_norm(given.pop("x"), given.pop("weight"), **given)


def test_overlapping_output_is_refused_before_anything_is_written():
    storage = torch.arange(24.0)
    before = storage.clone()
    x, weight = storage[:16].view(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="out must be x itself or share no memory with it, but overlaps x"):
        qwen_plugins.rms_norm(x, weight, out=storage[8:].view(2, 8))
    with pytest.raises(ValueError, match="but overlaps weight"):
        qwen_plugins.rms_norm(x[:1], storage[16:], out=storage[16:].view(1, 8))
    y = torch.empty(2, 8)
    with pytest.raises(ValueError, match=r"out\[1\] must not share memory with the other output"):
        qwen_plugins.rms_norm(x, weight, residual=x, out=(y, y))
    assert torch.equal(storage, before)


def test_columns_of_one_matrix_are_no_overlap():
    packed = torch.randn(4, 3, 128)
    y = packed[..., 64:]
    expected, _ = reference(packed[..., :64].clone(), torch.ones(64), 1e-6)
    assert_within_one_ulp(qwen_plugins.rms_norm(packed[..., :64], torch.ones(64), out=y), expected)
    with pytest.raises(ValueError, match="but overlaps x"):
        qwen_plugins.rms_norm(packed[..., :64], torch.ones(64), out=packed[..., 32:96])
    with pytest.raises(ValueError, match="out must not overlap itself"):
        qwen_plugins.rms_norm(torch.ones(4, 16), torch.ones(16), out=torch.zeros(100).as_strided((4, 16), (8, 1)))


def test_wrong_types():
    for x, weight, eps, name in (([1.0], WEIGHT, 1e-6, "x"), (X, None, 1e-6, "weight"), (X, WEIGHT, "a", "eps")):
        with pytest.raises(TypeError, match=f"{name} must be a"):
            qwen_plugins.rms_norm(x, weight, eps)
    with pytest.raises(TypeError, match=r"scale must be a torch\.Tensor, not float"):
        qwen_plugins.rms_norm_quant(X, WEIGHT, scale=0.1)
    with pytest.raises(TypeError, match=r"quant_dtype must be torch\.int8 or"):
        qwen_plugins.rms_norm_quant(X, WEIGHT, quant_dtype="int8")
