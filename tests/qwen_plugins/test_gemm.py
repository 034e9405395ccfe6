"""gemm against float64, in many layouts and inside CUDA graphs; arguments that are refused. Most run on a CPU too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen_plugins
from tests.qwen_plugins.gemm_reference import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    HALF_TYPES,
    make,
    reference,
    runs_hopper_kernels,
)


def check(x, weight, bias=None, activation=None, *, intermediate=None, **options):
    """Check y; `intermediate` is the allowed error of a sum, relative to the sum of absolute values."""
    y = qwen_plugins.gemm(x, weight, bias, activation=activation, **options)
    expected, size = reference(x, weight, bias, activation)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    # Our kernels round once. cuBLASLt may round before the bias and does before the activation; on the CPU PyTorch
    # rounds some sums.
    precision = torch.finfo(x.dtype).eps
    ours = x.is_cuda and expected.shape[:-1].numel() <= 16 and x.shape[-1] % 8 == 0
    if intermediate is None:
        intermediate = 2.0**-21 if ours else precision + 2.0**-21
    tolerance = 0.51 * precision * expected.abs() + intermediate * size + torch.finfo(x.dtype).tiny
    wrong = ~((y.double() - expected).abs() <= tolerance)
    assert not wrong.any(), f"{x.shape}: {int(wrong.sum())} wrong, first at {wrong.nonzero()[0].tolist()}"
    return y


def operands(rows, in_features, out_features, dtype, device, bias=True, activation=None):
    factor = 2 if activation == "swiglu" else 1
    x = make(rows, in_features, dtype=dtype, device=device)
    weight = make(factor * out_features, in_features, dtype=dtype, device=device, magnitude=in_features**-0.5)
    return x, weight, make(factor * out_features, dtype=dtype, device=device) if bias else None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(1, 1), (8, 1), (64, 8), (72, 33), (520, 300), (1024, 4), (2056, 517), (77, 65)]
)
def test_matches_float64(device, dtype, activation, in_features, out_features):
    for rows in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 64, 100):
        for bias in (True, False):
            x, weight, b = operands(rows, in_features, out_features, dtype, device, bias, activation)
            check(x, weight, b, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("in_features", [3584, 4096, 11008, 18944, 40000, 131072])
@pytest.mark.parametrize("out_features", [1200, 3581])  # groups of whole tiles and of parts; the last a part of one
def test_long_rows_match_float64(dtype, activation, in_features, out_features):
    for rows in (1, 2, 4, 8, 11, 16, 40):
        x, weight, bias = operands(rows, in_features, out_features, dtype, "cuda", True, activation)
        check(x, weight, bias, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("in_features", "out_features"),
    # Few tiles, whose k is split among the blocks of a cluster; about as many as multiprocessors; many more.
    [(40000, 848), (18944, 1784), (8232, 4104), (4096, 12288), (1000, 34008), (136, 250008)],
)
def test_tens_of_rows_match_float64(dtype, activation, in_features, out_features):
    on_hopper = runs_hopper_kernels()
    for rows in (17, 24, 32, 33, 48, 49, 63, 64, 65):
        # The kernel of stream_hopper.cu rounds once: the test fails if one of 40,000 columns of k is missing.
        intermediate = 2.0**-17 if on_hopper and rows <= 64 else None
        x, weight, bias = operands(rows, in_features, out_features, dtype, "cuda", rows % 4 > 0, activation)
        out = torch.full((rows * out_features + 64,), torch.nan, dtype=dtype, device="cuda")
        strided = torch.full((rows, in_features + 8), torch.nan, dtype=dtype, device="cuda")[:, :in_features]
        strided.copy_(x)
        y = out[:-64].view(rows, out_features)
        check(strided, weight, bias, activation, intermediate=intermediate, constant_weight=True, out=y)
        assert out[-64:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("in_features", [40, 136, 4104])
@pytest.mark.parametrize(
    ("rows", "out_features", "activation"),
    # What Hopper has a kernel of ours for, in each of the ways in which it is cut into tiles.
    [
        *[(rows, 11016, "swiglu") for rows in (65, 100, 127, 128, 511, 512, 1000, 1024, 1871, 2047, 4100)],
        *[(rows, 18944, "swiglu") for rows in (127, 250, 256, 701, 1000, 2500)],
        *[(rows, 8200, "swiglu") for rows in (250, 251, 512, 1501, 2176, 4000)],
        *[(rows, out_features, None) for rows in (1024, 2047, 4096) for out_features in (3576, 3584)],
    ],
)
def test_hundreds_of_rows_match_float64(dtype, in_features, rows, out_features, activation):
    # The kernel rounds once: the test fails for cuBLASLt's GEMM, rounded before SwiGLU, and without one column of k.
    # With fewer multiprocessors other sizes are cuBLASLt's.
    on_hopper = runs_hopper_kernels() and torch.cuda.get_device_properties().multi_processor_count == 132
    intermediate = 2.0**-17 if on_hopper else None
    x, weight, bias = operands(rows, in_features, out_features, dtype, "cuda", rows % 2 > 0, activation)
    out = torch.full((rows * out_features + 64,), torch.nan, dtype=dtype, device="cuda")
    strided = torch.full((rows, in_features + 8), torch.nan, dtype=dtype, device="cuda")[:, :in_features]
    strided.copy_(x)
    y = out[:-64].view(rows, out_features)
    check(strided, weight, bias, activation, intermediate=intermediate, constant_weight=rows % 4 > 0, out=y)
    assert out[-64:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_many_rows_with_swiglu_are_multiplied_in_parts(dtype):
    # Too many multiprocessors would be idle in Hopper's kernel; more rows than cuBLASLt has room for at once.
    x, weight, bias = operands(20000, 72, 264, dtype, "cuda", True, "swiglu")
    check(x, weight, bias, "swiglu")


@pytest.mark.gpu
@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 70),
    in_features=st.one_of(st.integers(1, 5000), st.integers(1, 700).map(lambda n: 8 * n)),
    out_features=st.integers(1, 5000),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    constant_weight=st.booleans(),
    padding=st.sampled_from([0, 1, 8, 24]),
    offset=st.sampled_from([0, 0, 1, 8]),
    seed=st.integers(0, 2**31),
)
def test_random_cases(dtype, rows, in_features, out_features, activation, bias, constant_weight, padding, offset, seed):
    torch.manual_seed(seed)
    x, weight, b = operands(rows, in_features, out_features, dtype, "cuda", bias, activation)
    storage = torch.full((offset + rows * (in_features + padding),), torch.nan, dtype=dtype, device="cuda")
    strided = storage[offset:].view(rows, in_features + padding)[:, :in_features]
    strided.copy_(x)
    out = torch.full((rows * out_features + 64,), torch.nan, dtype=dtype, device="cuda")
    y = check(strided, weight, b, activation, constant_weight=constant_weight, out=out[:-64].view(rows, out_features))
    assert y.data_ptr() == out.data_ptr()
    assert out[-64:].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_leading_dimensions_and_layouts(device, dtype):
    x, weight, bias = operands(60, 64, 24, dtype, device)
    for view in (x.view(3, 4, 5, 64), x.view(3, 20, 64).transpose(0, 1), x[::2], x[5], x[:, :64][:1].expand(7, 64)):
        check(view, weight, bias)
    check(make(64, 60, dtype=dtype, device=device).t(), weight, bias)
    check(make(6, 5, 1, dtype=dtype, device=device).transpose(0, 1), make(3, 1, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "out_features"), [(1, 96), (5, 96), (16, 96), (33, 96), (128, 22016)])
@pytest.mark.parametrize("offset", [1, 3, 4, 8])
def test_misaligned_operands(dtype, rows, out_features, offset):
    x, weight, bias = operands(rows, 512, out_features, dtype, "cuda")

    def moved(tensor):
        return torch.cat([tensor.new_full((offset,), torch.nan), tensor.flatten()])[offset:].view(tensor.shape)

    for activation in ACTIVATIONS:
        check(moved(x), weight, bias, activation)
        check(x, moved(weight), bias, activation)
        check(x, weight, moved(bias), activation)
        columns = out_features if activation is None else out_features // 2
        buffer = x.new_full((offset + rows * columns,), torch.nan)
        check(x, weight, bias, activation, out=buffer[offset:].view(rows, columns))
        assert buffer[:offset].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_extremes(rows):
    x, weight, bias = operands(rows, 256, 64, torch.float16, "cuda")
    x[0, 3] = torch.inf
    weight[5] = 0
    y = qwen_plugins.gemm(x, weight, bias)
    assert y[0, 5].isnan()
    assert y[0, 6].isinf()
    assert y[1:].isfinite().all()
    # float32 sums: 256 · 200 · 200 is far beyond float16.
    large = torch.full((rows, 256), 200.0, dtype=torch.float16, device="cuda")
    signs = torch.ones(8, 256, dtype=torch.float16, device="cuda")
    signs[:, ::2] = -1
    assert torch.equal(qwen_plugins.gemm(large, 200 * signs), torch.zeros(rows, 8, dtype=torch.float16, device="cuda"))
    assert qwen_plugins.gemm(large, 200 * signs.abs()).isinf().all()
    # Gates far from zero: silu is 0 or the gate itself.
    gate_up = torch.cat([torch.full((4, 256), -1.0), torch.full((4, 256), 1.0), torch.ones(8, 256)])
    y = qwen_plugins.gemm(torch.ones_like(large), gate_up.half().cuda(), activation="swiglu")
    assert torch.equal(y, torch.tensor([-0.0] * 4 + [65536.0] * 4).half().cuda().expand(rows, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 12, 16, 32, 64, 128, 200, 1024])
@pytest.mark.parametrize("constant_weight", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_captured_graph_behind_the_kernels_that_make_its_inputs(rows, constant_weight, activation):
    """Every GEMM reads what the one before it, or a copy, has just written; it is the first of its shape, too."""
    # Shapes that no other test has used: cuBLASLt is asked for the first time in the capture. At 32 and 64 rows they
    # are large enough for stream_hopper.cu, at 128 with SwiGLU and 1024 for tiles_hopper.cu.
    sizes = {32: (4360, 4), 64: (4616, 4), 128: (8072, 3), 1024: (3576, 4)}
    size, layers = sizes.get(rows, (1032 + 8 * rows, 12))
    x = make(rows, size, dtype=torch.float16, device="cuda")
    factor = 2 if activation else 1
    weights = [
        make(factor * size, size, dtype=torch.float16, device="cuda", magnitude=size**-0.5) for _ in range(layers)
    ]
    used = weights if constant_weight else [torch.zeros_like(weight) for weight in weights]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs = []
    with torch.cuda.graph(graph):
        h = x
        for weight, copy in zip(weights, used, strict=True):
            if not constant_weight:
                copy.copy_(weight)
            h = qwen_plugins.gemm(h, copy, activation=activation, constant_weight=constant_weight)
            outputs.append(h)
    for _ in range(3):
        x.copy_(make(rows, size, dtype=torch.float16, device="cuda"))
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        h = x
        for weight, output in zip(weights, outputs, strict=True):
            expected, scale = reference(h, weight, None, activation)
            intermediate = 2**-20 if rows <= 16 else 2**-10
            assert ((output.double() - expected).abs() <= 2**-11 * expected.abs() + intermediate * scale + 1e-7).all()
            h = output


@pytest.mark.gpu
def test_waits_for_a_weight_that_is_not_constant():
    expected_weight = make(4096, 4096, dtype=torch.float16, device="cuda", magnitude=0.02)
    for rows, out_features in ((1, 4096), (8, 4096), (16, 4096), (17, 4096), (64, 4096), (1024, 3584)):
        for _ in range(10):
            x = make(rows, 4096, dtype=torch.float16, device="cuda")
            weight = torch.full_like(expected_weight[:out_features], torch.nan)
            weight.copy_(expected_weight[:out_features])
            check(x, weight)


@pytest.mark.gpu
def test_streams_and_other_devices():
    x, weight, bias = operands(8, 4096, 4096, torch.float16, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check(x + 1, weight, bias)
    if torch.cuda.device_count() > 1:
        check(x.to("cuda:1"), weight.to("cuda:1"), bias.to("cuda:1"))
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_allocates_nothing_but_its_output_for_few_rows():
    x, weight, bias = operands(8, 4096, 4096, torch.float16, "cuda")
    out = torch.empty(8, 4096, dtype=torch.float16, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    qwen_plugins.gemm(x, weight, bias, out=out)
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.gpu
def test_cublas_lt_is_found_beside_pytorch():
    assert "libcublasLt.so" in qwen_plugins.cublas_lt_status()


@pytest.mark.gpu
def test_without_cublas_lt():
    selected = (
        "test_matches_float64 and cuda and 520 or test_misaligned or test_extremes or test_captured or switched_off"
    )
    environment = os.environ | {"QWEN_PLUGINS_CUBLASLT": "none", "QWEN_PLUGINS_TEST_INNER": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_says_where_cublas_lt_was_looked_for(tmp_path):
    nowhere = tmp_path / "libcublasLt.so"
    environment = os.environ | {"QWEN_PLUGINS_CUBLASLT": str(nowhere)}
    code = "import qwen_plugins; print(qwen_plugins.cublas_lt_status())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(f"cuBLASLt was not found; looked for {nowhere} (")


@pytest.mark.skipif(os.environ.get("QWEN_PLUGINS_CUBLASLT") != "none", reason="for test_without_cublas_lt")
def test_says_that_it_is_switched_off():
    assert "QWEN_PLUGINS_CUBLASLT is none" in qwen_plugins.cublas_lt_status()


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile(device):
    x, weight, bias = operands(4, 64, 32, torch.float32, device)
    compiled = torch.compile(
        lambda a, w, b: qwen_plugins.gemm(a, w, b, activation="swiglu") + 1, fullgraph=True, backend="aot_eager"
    )
    expected = qwen_plugins.gemm(x, weight, bias, activation="swiglu") + 1
    assert torch.equal(compiled(x, weight, bias), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_with_out(device):
    x, weight, bias = operands(4, 64, 32, torch.float32, device)

    def layer(x, out):
        y = qwen_plugins.gemm(x * 2, weight, bias, out=out)
        return y + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected_out = torch.empty(4, 32, device=device), torch.empty(4, 32, device=device)
    expected = layer(x, expected_out)
    assert torch.equal(compiled(x, out), expected)
    assert torch.equal(out, expected_out)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, weight, bias = operands(4, 64, 32, torch.float32, device)
    torch.library.opcheck(torch.ops.qwen_plugins.gemm.default, (x, weight, bias, "swiglu", False))
    out = torch.empty(4, 32, device=device)
    torch.library.opcheck(torch.ops.qwen_plugins.gemm_out.default, (x, weight, None, out, None, False))


X, WEIGHT = torch.zeros(2, 8), torch.zeros(6, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, not list"),
        ({"weight": None}, TypeError, r"weight must be a torch\.Tensor, not NoneType"),
        ({"x": X.int()}, TypeError, "x must be float16, bfloat16 or float32, not int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"shape is \(\)"),
        ({"x": torch.zeros(2, 0)}, ValueError, "last dimension of at least 1"),
        ({"x": X.clone().requires_grad_()}, ValueError, "torch.no_grad"),
        ({"weight": torch.zeros(6, 7)}, ValueError, r"shape \(out_features, 8\) for x of \(2, 8\), not \(6, 7\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"shape \(out_features, 8\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"not \(0, 8\)"),
        ({"weight": torch.zeros(8, 6).t()}, ValueError, r"weight must be contiguous, but its strides are \(1, 6\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be float32 like x, not float16"),
        (
            {"weight": WEIGHT.to("meta")},
            ValueError,
            "weight must be on the device of the first argument, cpu, not on meta",
        ),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have the shape \(6,\), not \(5,\)"),
        ({"bias": torch.zeros(12)[::2]}, ValueError, "bias must be contiguous"),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias must be float32 like x, not float16"),
        ({"activation": "gelu"}, ValueError, "activation must be None or \"swiglu\", not 'gelu'"),
        ({"weight": torch.zeros(5, 8), "activation": "swiglu"}, ValueError, "even number of rows with swiglu, not 5"),
        ({"out": torch.zeros(2, 5)}, ValueError, r"out must have the shape \(2, 6\), not \(2, 5\)"),
        ({"out": torch.zeros(6, 2).t()}, ValueError, "out must be contiguous"),
        ({"out": WEIGHT.view(-1)[:12].view(2, 6)}, ValueError, "out must not share memory with weight"),
    ],
)
def test_errors(arguments, error, message):
    given = {"x": X, "weight": WEIGHT} | arguments
    with pytest.raises(error, match=message):
        qwen_plugins.gemm(given.pop("x"), given.pop("weight"), **given)
