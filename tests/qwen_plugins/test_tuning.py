"""GEMM kernels by name: names and numbers, each kernel against float64, what falls back, and the measurement."""

from __future__ import annotations

import itertools

import pytest
import torch

from qwen_plugins import launch, tuning
from tests.qwen_plugins.gemm_reference import launch_layer, measure_undisturbed

# What engines hold: a number may neither change nor be given to another kernel.
NUMBERS = {
    "rules": 0,
    "stream": 0x10000,
    "stream:keeps_x": 0x10001,
    "stream:streams_x": 0x10002,
    "stream:small": 0x10003,
    "cublas_lt": 0x40000,
    **{f"cublas_lt:{i}": 0x40000 + i for i in (1, 2, 3)},
    "stream_in_parts": 0x50000,
    "plain": 0x60000,
    "cublas_lt_eight_bit": 0xC0000,
}
X_ROWS = (16, 24, 32, 48, 64, 96, 128, 192, 256)
HOPPER_NUMBERS = {
    "stream_hopper": 0x20000,
    **{f"stream_hopper:n{n}s{s}": 0x20000 + 8 * n + 8 * (s - 1) for n in X_ROWS for s in range(1, 9)},
    **{
        f"stream_hopper:n{n}s1w{w}": 0x20000 + 8 * n + i
        for n in X_ROWS
        for i, w in enumerate((2, 3, 4, 6, 8, 12, 16), 1)
    },
    "tiles_hopper": 0x30000,
    **{f"tiles_hopper:{c}x{b}": 0x30000 + 16 * c + b for c, b in ((256, 2), (224, 2), (192, 2), (192, 1))},
}
NAMES = [*NUMBERS, *(HOPPER_NUMBERS if launch.has_hopper_kernels() else [])]
ADDRESS = 4096  # never read
SHAPE = {"rows": 4, "in_features": 64, "out_features": 96}


def options(**changed):
    given = {"weight": ADDRESS, "bias": 0, "in_features": 64, "out_features": 96, "constant_weight": True}
    given |= {"activation": launch.Activation.none, "dtype": launch.DataType.float16}
    return given | changed


def test_numbers_of_the_names():
    numbers = NUMBERS | (HOPPER_NUMBERS if launch.has_hopper_kernels() else {})
    assert {name: launch.gemm_choice_number(name) for name in numbers} == numbers
    assert {launch.gemm_choice_name(number): number for number in numbers.values()} == numbers


@pytest.mark.parametrize("number", [-1, 1, 0xFFFF, 0x10004, 0x40004, 0x7F0000, 2**31 - 1])
def test_numbers_without_a_kernel(number):
    assert launch.gemm_choice_name(number) == ""


@pytest.mark.parametrize("name", ["", "stream:", "stream:n16s4", "Stream", "stream ", "gemm"])
def test_names_without_a_kernel(name):
    with pytest.raises(ValueError, match=f"this build of qwen_plugins has no GEMM kernel '{name}'"):
        launch.gemm_choice_number(name)
    with pytest.raises(ValueError, match=f"no GEMM kernel '{name}'"):
        launch.LinearLayer(**options(kernels=[(1, name)]))


@pytest.mark.parametrize("kernels", [[(0, "stream")], [(-1, "stream")], [(2, "stream"), (2, "plain")]])
def test_numbers_of_rows_must_increase(kernels):
    with pytest.raises(ValueError, match=r"the numbers of rows must increase from 1 on, but -?\d follows \d"):
        launch.LinearLayer(**options(kernels=kernels))


@pytest.mark.parametrize("activation", [launch.Activation.none, launch.Activation.swiglu])
@pytest.mark.parametrize("name", NAMES)
def test_the_workspace_serves_fewer_rows_and_the_rules(name, activation):
    def workspace_bytes(kernels, rows):
        return launch.LinearLayer(**options(kernels=kernels, activation=activation)).workspace_bytes(rows)

    rows = [0, 1, 2, 8, 16, 17, 40, 64, 65, 128, 1000, 9000, 2**29]
    for kernels in ([(1000, name)], [(1, "plain"), (8, name)], [(1, name), (16, "stream"), (64, name)]):
        sizes = [workspace_bytes(kernels, n) for n in rows]
        assert sizes == sorted(sizes)
        assert all(size >= workspace_bytes([], n) for size, n in zip(sizes, rows, strict=True))
    assert (workspace_bytes([(1000, name)], 1) > 0) == (name.split(":")[0] == "cublas_lt")


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    layer = launch.LinearLayer(**options(kernels=[(16, name)]))
    launch.gemm(layer, x=ADDRESS, x_row_stride=64, y=ADDRESS, rows=0, workspace=0, stream=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 0}, "rows must be between 1 and 2"),
        ({"in_features": 2**30}, "in_features must be between 1"),
        ({"out_features": -1}, "out_features must be between 1"),
        ({"out_features": 5, "activation": "swiglu"}, "out_features must be even with swiglu, not 5"),
        ({"activation": "gelu"}, "activation must be None or \"swiglu\", not 'gelu'"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, not 'int8'"),
    ],
)
def test_bad_shapes(changed, message):
    for function in (tuning.candidates, tuning.choice_by_rules, tuning.measure):
        with pytest.raises(ValueError, match=message):
            function(**(SHAPE | changed))


def test_an_unknown_name_is_not_measured():
    with pytest.raises(ValueError, match="no GEMM kernel 'fastest'"):
        tuning.measure(**SHAPE, kernels=["plain", "fastest"])


def test_more_memory_than_a_number_of_bytes_can_say():
    most = 2**30 - 1
    with pytest.raises(RuntimeError, match=r"takes \d{19} bytes of device memory, more than are free"):
        tuning.measure(rows=most, in_features=most, out_features=most, dtype="float32", kernels=["plain"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu():
    for function in (tuning.candidates, tuning.choice_by_rules, tuning.measure):
        with pytest.raises(RuntimeError, match="CUDA"):
            function(**SHAPE)
    with pytest.raises(RuntimeError, match=r"describe_device: .*CUDA"):
        tuning.environment()


# On a GPU


def multiply(name, x, weight, bias=None, activation=None):
    """Compute y with a kernel, and check what surrounds y."""
    rows, in_features = x.shape
    layer = launch.LinearLayer(
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        in_features=in_features,
        out_features=weight.shape[0],
        activation=launch.Activation.__members__[activation or "none"],
        dtype=launch.DataType.__members__[str(x.dtype).removeprefix("torch.")],
        constant_weight=False,
        kernels=[(2**29, name)],
    )
    out = torch.full((rows * layer.columns + 64,), torch.nan, dtype=x.dtype, device="cuda")
    launch_layer(layer, x, out)
    assert out[-64:].isnan().all()
    return out[:-64].view(rows, layer.columns)


def operands(rows, in_features, out_features, dtype, bias=True):
    x = torch.randn(rows, in_features, device="cuda").to(dtype)
    weight = (torch.randn(out_features, in_features, device="cuda") * in_features**-0.5).to(dtype)
    return x, weight, torch.randn(out_features, device="cuda").to(dtype) if bias else None


def reference(x, weight, bias, activation, intermediate=None):
    """Return y in float64 and the allowed errors; cuBLASLt rounds before the bias or the activation."""
    z = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        z, size = z + bias.double(), size + bias.double().abs()
    if activation == "swiglu":
        (gate, up), (gate_size, up_size) = z.chunk(2, dim=-1), size.chunk(2, dim=-1)
        silu = gate * torch.sigmoid(gate)
        z, size = silu * up, 1.1 * gate_size * up.abs() + silu.abs() * up_size
    precision = torch.finfo(x.dtype).eps
    return z, 0.51 * precision * z.abs() + (intermediate or precision + 2.0**-20) * size


def check(name, y, expected, tolerance):
    wrong = ~((y.double() - expected).abs() <= tolerance)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} wrong, first at {wrong.nonzero()[0].tolist()}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 16), (520, 304), (1000, 8208), (4104, 1040), (896, 9728), (77, 66), (72, 34)]
)
def test_every_kernel_matches_float64(dtype, activation, in_features, out_features):
    for rows, bias in itertools.product((1, 7, 8, 9, 16, 17, 31, 33, 48, 64, 65, 130, 300), (True, False)):
        given = operands(rows, in_features, out_features, dtype, bias)
        expected = reference(*given, activation)
        for i, name in enumerate(NAMES):
            # Of the many variants of one kernel a quarter with each number of rows.
            if not name.startswith("stream_hopper:") or (i + rows) % 4 == 0:
                check(f"{name}, {rows} rows", multiply(name, *given, activation), *expected)


@pytest.mark.gpu
@pytest.mark.skipif(not launch.has_hopper_kernels(), reason="for Hopper's kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("in_features", "out_features", "activation"),
    # k in parts of 64 and a rest, fewer parts than splits, many parts; weight rows that are no multiple of anything.
    [
        (584, 523, None),
        (40, 1001, None),
        (4864, 896, None),
        (1096, 3584, None),
        (584, 528, "swiglu"),
        (3080, 1200, "swiglu"),
    ],
)
def test_stream_hopper_rounds_once_and_repeats_its_bits(dtype, in_features, out_features, activation):
    names = [name for name in NAMES if name.startswith("stream_hopper")]
    for rows in (1, 15, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257, 600):
        given = operands(rows, in_features, out_features, dtype, rows % 2 > 0)
        expected = reference(*given, activation, intermediate=2.0**-17)
        for name in names[rows % 5 :: 5]:
            y = multiply(name, *given, activation)
            if torch.equal(y, multiply("rules", *given, activation)):
                continue  # of this size, which the variant does not take
            check(f"{name}, {rows} rows", y, *expected)
            assert torch.equal(multiply(name, *given, activation), y)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 100])
def test_misaligned_operands(rows, activation):
    x, weight, bias = operands(rows, 512, 1024, torch.float16)

    def moved(tensor):
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)

    expected = reference(x, weight, bias, activation)
    for name in NAMES:
        for given in ((moved(x), weight, bias), (x, moved(weight), bias), (x, weight, moved(bias))):
            check(name, multiply(name, *given, activation), *expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 40, 100])
def test_what_cannot_run_falls_back_to_the_rules(rows):
    x, weight, bias = operands(rows, 512, 1024, torch.float16)
    shape = {"rows": rows, "in_features": 512, "out_features": 1024}
    expected = multiply("rules", x, weight, bias)
    assert torch.equal(multiply(tuning.choice_by_rules(**shape), x, weight, bias), expected)
    if rows > 16:
        assert torch.equal(multiply("stream", x, weight, bias), expected)
    if launch.has_hopper_kernels():
        assert torch.equal(
            multiply("stream_hopper:n16s8", x[:, :448], weight[:, :448].contiguous(), bias),
            (multiply("rules", x[:, :448], weight[:, :448].contiguous(), bias)),
        )  # k has seven parts of 64
        assert torch.equal(multiply("tiles_hopper:256x2", x, weight, bias), expected)  # for SwiGLU alone


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("rows", [1, 12, 32, 64, 128])
def test_every_candidate_in_a_cuda_graph(rows, activation):
    shape = {"rows": rows, "in_features": 1032, "out_features": 2064, "activation": activation}
    x, weight, bias = operands(rows, 1032, 2064, torch.float16)
    names = tuning.candidates(**shape)
    assert names
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [multiply_captured(name, x, weight, bias, activation) for name in names]
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = reference(x, weight, bias, activation)
    for name, y in zip(names, outputs, strict=True):
        check(name, y, *expected)


def multiply_captured(name, x, weight, bias, activation):
    layer = launch.LinearLayer(
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        in_features=x.shape[1],
        out_features=weight.shape[0],
        activation=launch.Activation.__members__[activation or "none"],
        dtype=launch.DataType.float16,
        constant_weight=True,
        kernels=[(x.shape[0], name)],
    )
    y = x.new_empty(x.shape[0], layer.columns)
    workspace = x.new_empty(max(layer.workspace_bytes(x.shape[0]), 1), dtype=torch.uint8)
    stream = torch.cuda.current_stream().cuda_stream
    addresses = {"x": x.data_ptr(), "y": y.data_ptr(), "workspace": workspace.data_ptr(), "stream": stream}
    launch.gemm(layer, x_row_stride=x.stride(0), rows=x.shape[0], **addresses)
    return y


@pytest.mark.gpu
def test_candidates():
    few = {"rows": 4, "in_features": 4096, "out_features": 4096}
    assert {"stream:keeps_x", "stream:streams_x"} <= set(tuning.candidates(**few))
    assert tuning.choice_by_rules(**few) == "stream"
    many = {"rows": 2048, "in_features": 4096, "out_features": 4096}
    assert not any(name.startswith(("stream", "plain")) for name in tuning.candidates(**many))
    assert set(tuning.candidates(**many)) <= set(NAMES)
    # Only cuBLASLt computes in float32.
    assert set(tuning.candidates(**few, dtype="float32")) == {"cublas_lt:1", "cublas_lt:2", "cublas_lt:3"}
    if launch.has_hopper_kernels() and torch.cuda.get_device_capability()[0] == 9:
        assert any(name.startswith("stream_hopper:") for name in tuning.candidates(**(few | {"rows": 32})))
        assert any(name.startswith("tiles_hopper:") for name in tuning.candidates(**many, activation="swiglu"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 24, 200])
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_measure(rows, activation):
    shape = {"rows": rows, "in_features": 1024, "out_features": 4096, "activation": activation}
    times = measure_undisturbed(**shape)
    assert list(times) == [name for name in tuning.candidates(**shape) if name in times]
    assert len(times) >= 2
    assert all(0.5 < time < 500 for time in times.values())
    only = measure_undisturbed(**shape, bias=True, kernels=["rules", "stream_in_parts", "plain"])
    assert list(only) == ["rules", "stream_in_parts", "plain"]
    assert only["plain"] > 2 * only["rules"]
    if rows > 16:
        assert tuning.measure(**shape, kernels=["stream"]) == {}


@pytest.mark.gpu
def test_measure_while_a_stream_is_captured():
    x = torch.ones(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        times = tuning.measure(rows=8, in_features=512, out_features=1024)
        y = y + 1
    assert times
    x.fill_(5)
    graph.replay()
    assert (y == 7).all()


@pytest.mark.gpu
def test_measure_frees_its_memory():
    """If it did not, the device would have too little after so many measurements, whoever else uses it."""
    shape = {"rows": 1, "in_features": 2**15, "out_features": 2**15}
    weight_bytes = 2**31
    for _ in range(torch.cuda.get_device_properties().total_memory // weight_bytes + 1):
        assert tuning.measure(**shape, kernels=["rules", "stream"])


@pytest.mark.gpu
def test_measure_says_how_much_memory_it_lacks():
    with pytest.raises(RuntimeError, match=r"measuring 536870912 rows times \[64, 131072\] takes \d{15} bytes"):
        tuning.measure(rows=2**29, in_features=2**17, out_features=64)
    torch.ones(1, device="cuda").sum().item()  # the error is not found by another


@pytest.mark.gpu
def test_environment():
    environment = tuning.environment()
    assert environment["gpu"] == torch.cuda.get_device_name()
    assert environment["multiprocessors"] == torch.cuda.get_device_properties().multi_processor_count
    assert environment["driver"] >= 12000
    assert environment["cublas_lt"] >= 120000
    assert environment["kernels"] == launch.GEMM_KERNELS_VERSION
