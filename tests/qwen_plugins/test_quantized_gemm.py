"""gemm with int4 and int8 weights against float64, every kernel by its name, layouts, graphs; refused arguments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import qwen_plugins
from qwen_plugins import QuantizedWeight, launch
from tests.qwen_plugins.gemm_reference import (
    ACTIVATIONS,
    DEVICES,
    HALF_TYPES,
    launch_layer,
    make,
    reference,
    runs_hopper_kernels,
)

GROUPS = {0: 1, 32: 32, 64: 64, 128: 128, 256: 256}


class Layer:
    """A weight as codes, packed, and as float64."""

    def __init__(self, in_features, out_features, *, bits, group_size, zeros, dtype, device="cuda", permuted=False):
        generator = torch.Generator().manual_seed(in_features + 7 * out_features + bits)
        groups = in_features // group_size if group_size else 1
        codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8)
        scales = torch.rand(out_features, groups, generator=generator) + 0.5
        scales = (scales / (2**bits * in_features**0.5)).to(dtype)
        zero_points = None
        if zeros:
            zero_points = torch.randint(0, 2**bits, (out_features, groups), generator=generator, dtype=torch.uint8)
        permutation = torch.randperm(in_features, generator=generator) if permuted else None
        self.packed = QuantizedWeight.from_codes(
            codes, scales, zero_points, permutation, bits=bits, group_size=group_size
        ).to(device)
        middle = 2 ** (bits - 1) if zero_points is None else _per_column(zero_points.double(), in_features)
        weight = _per_column(scales.double(), in_features) * (codes.double() - middle)
        if permutation is not None:
            in_order = torch.empty_like(weight)
            in_order[:, permutation] = weight
            weight = in_order
        self.weight = weight.to(device)


def _per_column(values, in_features):
    return values.repeat_interleave(in_features // values.shape[1], dim=1)


def check(y, x, weight, bias, activation, *, may_round_sums=False):
    """Check for one rounding, of weights that are exact or rounded once to the type of x.

    cuBLASLt's sums may be rounded before the bias, and are before the activation.
    """
    wrong = []
    precision = torch.finfo(x.dtype).eps
    intermediate = precision if may_round_sums else 2.0**-17
    for multiplied in (weight, weight.to(x.dtype)):
        expected, size = reference(x, multiplied, bias, activation)
        assert y.shape == expected.shape
        tolerance = 0.51 * precision * expected.abs() + intermediate * size + torch.finfo(x.dtype).tiny
        wrong.append(~((y.double() - expected).abs() <= tolerance))
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    fewest = min(wrong, key=lambda one: int(one.sum()))
    assert not fewest.any(), f"{x.shape}: {int(fewest.sum())} wrong, first at {fewest.nonzero()[0].tolist()}"


def operands(rows, layer, dtype, activation, bias=True):
    out_features, in_features = layer.weight.shape
    x = make(rows, in_features, dtype=dtype, device=layer.weight.device.type)
    b = make(out_features, dtype=dtype, device=layer.weight.device.type) if bias else None
    return x, b


FORMATS = [
    {"bits": bits, "group_size": group_size, "zeros": zeros}
    for bits in (4, 8)
    for group_size, zeros in ((0, False), (0, True), (32, True), (64, False), (128, False), (128, True), (256, True))
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_matches_float64(device, dtype, activation, weight_format):
    for in_features, out_features in ((256, 64), (768, 208), (512, 650)):
        layer = Layer(in_features, out_features, **weight_format, dtype=dtype, device=device)
        for rows in (0, 1, 16, 130) if device == "cpu" else (0, 1, 2, 7, 16, 17, 33, 64, 65, 130):
            x, bias = operands(rows, layer, dtype, activation, bias=rows % 2 > 0)
            y = qwen_plugins.gemm(x, layer.packed, bias, activation=activation)
            fits = out_features % (32 if activation else 8) == 0  # Hopper's kernel of many rows
            by_cublas_lt = device == "cuda" and rows > 16 and not (fits and runs_hopper_kernels())
            check(y, x, layer.weight, bias, activation, may_round_sums=by_cublas_lt)


@pytest.mark.parametrize("device", DEVICES)
def test_any_number_of_columns_in_one_group(device):
    for in_features in (1, 8, 100, 136, 1001):
        layer = Layer(in_features, 40, bits=4, group_size=0, zeros=True, dtype=torch.float16, device=device)
        for rows in (1, 5, 40, 100):
            x, bias = operands(rows, layer, torch.float16, None)
            y = qwen_plugins.gemm(x, layer.packed, bias)
            check(y, x, layer.weight, bias, None, may_round_sums=rows > 16 and device == "cuda")


def launch_kernel(name, layer, x, bias, activation, y, workspace=None):
    """Launch one kernel by its name on operands of any address; the rules decide where it cannot compute y."""
    packed = layer.packed
    linear = launch.LinearLayer(
        weight=packed.codes.data_ptr(),
        scales=packed.scales.data_ptr(),
        zeros=0 if packed.zeros is None else packed.zeros.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        in_features=packed.in_features,
        out_features=packed.out_features,
        activation=launch.Activation.__members__[activation or "none"],
        dtype=launch.DataType.__members__[str(x.dtype).removeprefix("torch.")],
        constant_weight=True,
        kernels=[(2**29, name)],
        weight_format=launch.WeightFormat(
            kind=launch.WeightKind.__members__[f"int{packed.bits}"],
            group_size=packed.group_size,
            has_zeros=packed.zeros is not None,
            scale_dtype=launch.DataType.__members__[str(packed.scales.dtype).removeprefix("torch.")],
        ),
    )
    launch_layer(linear, x, y)


KERNELS = [
    "dequantized",
    *[f"tiles_quantized:{size}{splits}" for size in ("n128", "n256") for splits in ("s1", "s3", "s8", "e")],
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_each_kernel_of_many_rows(dtype, activation, kernel, bits):
    if kernel.startswith("tiles") and not runs_hopper_kernels():
        pytest.skip("for Hopper")
    for in_features, out_features, group_size, zeros in (
        (1024, 1312, 128, False),
        (4192, 288, 32, True),
        (640, 4640, 64, True),
        (2056, 320, 0, False),
    ):
        layer = Layer(in_features, out_features, bits=bits, group_size=group_size, zeros=zeros, dtype=dtype)
        for rows in (17, 64, 65, 127, 200, 256, 513, 1100):
            x, bias = operands(rows, layer, dtype, activation, bias=rows % 2 > 0)
            strided = torch.full((rows, in_features + 8), torch.nan, dtype=dtype, device="cuda")[:, :in_features]
            strided.copy_(x)
            columns = out_features // (2 if activation else 1)
            buffer = torch.full((rows * columns + 64,), torch.nan, dtype=dtype, device="cuda")
            y = buffer[:-64].view(rows, columns)
            launch_kernel(kernel, layer, strided, bias, activation, y)
            check(y, x, layer.weight, bias, activation, may_round_sums=kernel == "dequantized")
            assert buffer[-64:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["tiles_quantized:n128e", "tiles_quantized:n256s3"])
def test_parts_of_tiles_are_added_alike_every_time(kernel):
    """Clusters wait for each other's sums; a graph launches again with the workspace as it was left."""
    if not runs_hopper_kernels():
        pytest.skip("for Hopper")
    layer = Layer(2048, 1024, bits=4, group_size=128, zeros=False, dtype=torch.float16)
    x, bias = operands(300, layer, torch.float16, None)
    outputs = [x.new_empty(300, 1024) for _ in range(3)]
    workspace = torch.full((256 << 20,), 255, dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for y in outputs:
            launch_kernel(kernel, layer, x, bias, None, y, workspace)
    graph.replay()
    first = outputs[0].clone()
    check(first, x, layer.weight, bias, None)
    for _ in range(20):
        for y in outputs:
            y.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(y, first) for y in outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("in_features", "out_features", "activation"), [(3584, 4608, None), (3584, 9472, "swiglu")])
def test_prompts_match_float64(dtype, in_features, out_features, activation):
    for bits, group_size in ((4, 128), (8, 0)):
        layer = Layer(in_features, out_features, bits=bits, group_size=group_size, zeros=False, dtype=dtype)
        for rows in (96, 129, 1000, 2048, 8192):
            x, bias = operands(rows, layer, dtype, activation)
            y = qwen_plugins.gemm(x, layer.packed, bias, activation=activation, constant_weight=True)
            by_cublas_lt = not runs_hopper_kernels() or (rows >= 4096 and activation is None)
            check(y, x, layer.weight, bias, activation, may_round_sums=by_cublas_lt)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("rows", [1, 16, 40, 100, 300])
def test_scales_of_another_type(dtype, rows):
    other = HALF_TYPES[1 - HALF_TYPES.index(dtype)]
    layer = Layer(512, 256, bits=4, group_size=64, zeros=True, dtype=other)
    for activation in ACTIVATIONS:
        x, bias = operands(rows, layer, dtype, activation)
        y = qwen_plugins.gemm(x, layer.packed, bias, activation=activation)
        check(y, x, layer.weight, bias, activation, may_round_sums=rows > 16)


@pytest.mark.parametrize("device", DEVICES)
def test_float32(device):
    layer = Layer(256, 96, bits=4, group_size=64, zeros=True, dtype=torch.float16, device=device)
    for rows in (1, 20, 70):
        x, bias = operands(rows, layer, torch.float32, None)
        check(qwen_plugins.gemm(x, layer.packed, bias), x, layer.weight, bias, None)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 33, 128, 1024])
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_views(rows, offset):
    layer = Layer(512, 1024, bits=4, group_size=128, zeros=False, dtype=torch.float16)
    for activation in ACTIVATIONS:
        x, bias = operands(rows, layer, torch.float16, activation)

        def moved(tensor):
            return torch.cat([tensor.new_full((offset,), torch.nan), tensor.flatten()])[offset:].view(tensor.shape)

        columns = 512 if activation else 1024
        for view, b in ((moved(x), bias), (x, moved(bias))):
            buffer = x.new_full((offset + rows * columns,), torch.nan)
            out = buffer[offset:].view(rows, columns)
            y = qwen_plugins.gemm(view, layer.packed, b, activation=activation, out=out)
            check(y, x, layer.weight, bias, activation, may_round_sums=rows > 16)
            assert buffer[:offset].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 70])
def test_act_order(device, rows):
    layer = Layer(384, 128, bits=4, group_size=128, zeros=True, dtype=torch.float16, device=device, permuted=True)
    assert torch.equal(layer.packed.dequantize().double(), layer.weight)
    x, bias = operands(rows, layer, torch.float16, None)
    check(qwen_plugins.gemm(x, layer.packed, bias), x, layer.weight, bias, None)
    assert qwen_plugins.gemm(x.view(rows, 1, 384), layer.packed).shape == (rows, 1, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 64, 128, 1024])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_captured_graph_behind_the_kernels_that_make_its_inputs(rows, activation):
    layer = Layer(1152, 2304 if activation else 1152, bits=4, group_size=128, zeros=False, dtype=torch.float16)
    x = make(rows, 1152, dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs = []
    with torch.cuda.graph(graph):
        h = x
        for _ in range(6):
            h = qwen_plugins.gemm(h, layer.packed, activation=activation, constant_weight=True)
            outputs.append(h)
    for _ in range(3):
        x.copy_(make(rows, 1152, dtype=torch.float16, device="cuda"))
        graph.replay()
        h = x
        for output in outputs:
            check(output, h, layer.weight, None, activation, may_round_sums=rows > 16 and not runs_hopper_kernels())
            h = output


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_torch_compile(device):
    layer = Layer(64, 32, bits=4, group_size=32, zeros=True, dtype=torch.float16, device=device, permuted=True)
    packed = layer.packed
    x, bias = operands(3, layer, torch.float16, None)
    operators = torch.ops.qwen_plugins
    weight = (packed.codes, packed.scales, packed.zeros, packed.permutation)
    torch.library.opcheck(operators.gemm_quantized.default, (x, *weight, bias, 32, 32, "swiglu", False))
    out = torch.empty(3, 32, dtype=torch.float16, device=device)
    torch.library.opcheck(operators.gemm_quantized_out.default, (x, *weight, None, out, 32, 32, None, True))

    def function(x, out):
        return qwen_plugins.gemm(x * 2, packed, bias, out=out) + qwen_plugins.gemm(x, packed, bias)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected_out = torch.empty_like(out)
    assert torch.equal(compiled(x, out), function(x, expected_out))
    assert torch.equal(out, expected_out)


def test_a_weight_on_the_meta_device():
    packed = Layer(64, 32, bits=8, group_size=0, zeros=False, dtype=torch.bfloat16, device="cpu").packed
    x = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="meta")
    y = qwen_plugins.gemm(x, packed.to("meta"), activation="swiglu")
    assert (y.shape, y.dtype) == ((2, 5, 16), torch.bfloat16)


def test_from_packed_arrays():
    codes = np.arange(64 * 32, dtype=np.uint8).reshape(64, 32) % 16
    scales = np.full((64, 1), 0.5, np.float16)
    packed = qwen_plugins.quantized.pack(codes, scales, bits=4, group_size=32)
    order = np.roll(np.arange(32), 1)
    weight = QuantizedWeight.from_packed(packed, order).dequantize().numpy()
    assert np.array_equal(weight[:, order], 0.5 * (codes.astype(np.float32) - 8))


PACKED = {"bits": 4, "group_size": 32, "zeros": True, "dtype": torch.float16, "device": "cpu"}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"codes": torch.zeros(1, 4, 255, dtype=torch.int32)}, ValueError, r"codes must have the shape \(1, 4, .*255"),
        ({"codes": torch.zeros(1, 4, 256)}, TypeError, "codes must be int32, not float32"),
        ({"scales": torch.ones(3, 64).half()}, ValueError, r"scales must have the shape \(4, 64\), not \(3, 64\)"),
        ({"scales": torch.ones(4, 64)}, TypeError, "scales must be float16 or bfloat16, not float32"),
        ({"scales": torch.ones(64, 4).half().t()}, ValueError, "scales must be contiguous"),
        ({"zeros": torch.zeros(4, 32, dtype=torch.uint8)}, ValueError, "zeros must have the shape"),
        ({"permutation": torch.zeros(60, dtype=torch.int32)}, ValueError, r"permutation must have the shape \(64,\)"),
        ({"group_size": 48}, ValueError, "group_size must be 32, 64, 128 or 0, not 48"),
        ({"group_size": 128}, ValueError, "x must have columns in groups of 128, not 64"),
        ({"out_features": 65}, ValueError, "codes must have the shape"),
        (
            {"codes": torch.zeros(1, 4, 256, dtype=torch.int32, device="meta")},
            ValueError,
            "codes must be on the device",
        ),
    ],
)
def test_errors_of_the_weight(changed, error, message):
    packed = Layer(64, 64, **PACKED).packed
    with pytest.raises(error, match=message):
        qwen_plugins.gemm(torch.zeros(2, 64, dtype=torch.float16), replace(packed, **changed))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x must be a torch\.Tensor, not list"),
        ({"x": torch.zeros(2, 64).int()}, TypeError, "x must be float16, bfloat16 or float32, not int32"),
        ({"bias": torch.zeros(63)}, ValueError, r"bias must have the shape \(64,\), not \(63,\)"),
        ({"activation": "gelu"}, ValueError, "activation must be None or"),
        ({"out": torch.zeros(2, 63)}, ValueError, r"out must have the shape \(2, 64\)"),
    ],
)
def test_errors(changed, error, message):
    given = {"x": torch.zeros(2, 64), "weight": Layer(64, 64, **PACKED).packed} | changed
    with pytest.raises(error, match=message):
        qwen_plugins.gemm(given.pop("x"), given.pop("weight"), **given)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"codes": torch.zeros(4, 64, dtype=torch.int8)}, TypeError, "codes must be uint8, not int8"),
        ({"scales": torch.ones(4, 2)}, TypeError, "scales must be float16 or bfloat16, not float32"),
        ({"permutation": torch.zeros(64, dtype=torch.int32)}, ValueError, "name each of 64 columns once"),
        ({"bits": 3}, ValueError, "bits must be 4 or 8, not 3"),
        ({"group_size": 24}, ValueError, "group"),
    ],
)
def test_errors_of_packing(changed, error, message):
    given = {"codes": torch.zeros(4, 64, dtype=torch.uint8), "scales": torch.ones(4, 2).half(), "bits": 4}
    given |= {"group_size": 32} | changed
    with pytest.raises(error, match=message):
        QuantizedWeight.from_codes(given.pop("codes"), given.pop("scales"), **given)
