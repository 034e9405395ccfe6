"""The kernel that streams quantized weights, each variant by its name, against float64; its numbers and candidates."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen_plugins import launch, quantized, tuning
from tests.qwen_plugins.gemm_reference import ACTIVATIONS, HALF_TYPES, make, measure_undisturbed, reference

WAVES = (1, 2, 3, 4, 6, 8, 12, 16)
VARIANTS = {  # by name, the numbers that engines hold
    **{f"s{splits}{'h' if half else ''}": half * 1024 + splits * 32 + 1 for splits in range(1, 9) for half in (0, 1)},
    **{f"s1w{waves}{'h' if half else ''}": half * 1024 + 32 + waves for waves in WAVES[1:] for half in (0, 1)},
    **{f"s{splits}w{waves}": splits * 32 + waves for splits in (2, 3, 4) for waves in (2, 3, 4, 6)},
}
NAMES = ["stream_quantized", *(f"stream_quantized:{variant}" for variant in VARIANTS)]
hopper = pytest.mark.skipif(not launch.has_hopper_kernels(), reason="for Hopper's kernels")
SCALE_TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Weight:
    """A random quantized weight on the GPU, packed, and its exact values in float64.

    lowest: of the codes. With 0 their mean is below the zero point in the middle: products of products then grow.
    """

    def __init__(self, out_features, in_features, bits, group_size, zeros, scale_dtype="float16", lowest=0):
        generator = np.random.default_rng(out_features + in_features)
        groups = in_features // group_size if group_size else 1
        codes = generator.integers(lowest, 2**bits, (out_features, in_features), dtype=np.uint8)
        scales = generator.uniform(1, 4, (out_features, groups)) / 2**bits / in_features**0.5
        points = generator.integers(0, 2**bits, (out_features, groups), dtype=np.uint8) if zeros else None
        packed = quantized.pack(
            codes, scales.astype(SCALE_TYPES[scale_dtype]), points, bits=bits, group_size=group_size
        )
        self.format = packed.format
        self.values = torch.from_numpy(quantized.dequantize(packed)).cuda().double()
        self.codes = torch.from_numpy(packed.codes).cuda()
        self.scales = torch.from_numpy(packed.scales.view(np.int16)).cuda()
        self.zeros = None if packed.zeros is None else torch.from_numpy(packed.zeros).cuda()


def multiply(name, x, weight, bias=None, activation=None, offset=0):
    """Compute y with a kernel and check what surrounds y, which begins `offset` elements behind an aligned address."""
    out_features, in_features = weight.values.shape
    layer = launch.LinearLayer(
        weight=weight.codes.data_ptr(),
        scales=weight.scales.data_ptr(),
        zeros=0 if weight.zeros is None else weight.zeros.data_ptr(),
        weight_format=weight.format.for_launch(),
        bias=0 if bias is None else bias.data_ptr(),
        in_features=in_features,
        out_features=out_features,
        activation=launch.Activation.__members__[activation or "none"],
        dtype=launch.DataType.__members__[str(x.dtype).removeprefix("torch.")],
        constant_weight=offset == 0,
        kernels=[(2**29, name)],
    )
    rows = x.shape[0]
    end = offset + rows * layer.columns
    out = torch.full((end + 64,), torch.nan, dtype=x.dtype, device="cuda")
    workspace = torch.empty(max(layer.workspace_bytes(rows), 1), dtype=torch.uint8, device="cuda")
    launch.gemm(
        layer,
        x=x.data_ptr(),
        x_row_stride=x.stride(0),
        y=out[offset:].data_ptr(),
        rows=rows,
        workspace=workspace.data_ptr(),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    assert out[:offset].isnan().all()
    assert out[end:].isnan().all()
    return out[offset:end].view(rows, layer.columns)


def strided(rows, in_features, dtype):
    """Return random x among NaN: columns and rows that the kernel must not read."""
    storage = torch.full((rows + 1, in_features + 8), torch.nan, dtype=dtype, device="cuda")
    storage[:rows, :in_features] = make(rows, in_features, dtype=dtype, device="cuda")
    return storage[:rows, :in_features]


def check(name, y, expected, size):
    """Check for one rounding at the end."""
    precision = torch.finfo(y.dtype).eps
    tolerance = 0.51 * precision * expected.abs() + 2.0**-21 * size + 1e-7
    wrong = ~((y.double() - expected).abs() <= tolerance)
    assert not wrong.any(), f"{name}: {int(wrong.sum())} wrong, first at {wrong.nonzero()[0].tolist()}"


@hopper
def test_numbers_of_the_names():
    numbers = {f"stream_quantized:{variant}": 0x70000 + number for variant, number in VARIANTS.items()}
    assert {name: launch.gemm_choice_number(name) for name in numbers} == numbers


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "zeros"), list(itertools.product([0, 32, 64, 128], [False, True])))
def test_every_variant_matches_float64(dtype, activation, bits, group_size, zeros):
    # Few chunks of k and many; rows that are no multiple of a block of 16, and with SwiGLU whole blocks.
    for in_features, out_features in ((640, 448), (1184 if group_size == 32 else 1152, 4256 if activation else 3581)):
        scale_dtype = "bfloat16" if zeros else "float16"
        weight = Weight(out_features, in_features, bits, group_size, zeros, scale_dtype)
        for rows in (1, 2, 3, 7, 8, 9, 16, 17, 24, 32, 33, 63, 64):
            x = strided(rows, in_features, dtype)
            bias = make(out_features, dtype=dtype, device="cuda") if rows % 2 else None
            expected = reference(x, weight.values, bias, activation)
            for i, name in enumerate(NAMES):
                if (i + rows) % 3 == 0:  # a third of the variants with each number of rows
                    check(f"{name}, {rows} rows", multiply(name, x, weight, bias, activation), *expected)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_one_and_two_rows_of_any_magnitude(dtype, group_size, zeros):
    """Elements of up to 2^30 times the magnitude of others, zeros, and the smallest numbers of the type."""
    generator = torch.Generator("cuda").manual_seed(0)
    # The last chunk of k is not whole.
    in_features = 1024 if group_size else 1000
    weight = Weight(336, in_features, 4, group_size, zeros)
    smallest = torch.finfo(dtype).tiny
    for rows in (1, 2):
        for powers in ((-20, 10), (-3, 3), (0, 0)):
            exponents = torch.randint(powers[0], powers[1] + 1, (rows, in_features), device="cuda", generator=generator)
            x = (torch.randn(rows, in_features, device="cuda", generator=generator) * 2.0**exponents).to(dtype)
            x[:, 128:256] = 0
            x[:, 256:384] *= smallest
            expected = reference(x, weight.values, None, None)
            for name in NAMES:
                check(f"{name}, {rows} rows", multiply(name, x, weight), *expected)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("power", [-80, 80])
def test_one_and_two_rows_times_a_power_of_two(power):
    """Results have the same digits, whatever the magnitude of x."""
    weight = Weight(336, 1024, 4, 128, True)
    for rows in (1, 2):
        x = make(rows, 1024, dtype=torch.bfloat16, device="cuda")
        for name in NAMES:
            y = multiply(name, x, weight)
            assert torch.equal(multiply(name, x * 2.0**power, weight), y * 2.0**power), f"{name}, {rows} rows"


@hopper
@pytest.mark.gpu
def test_more_inputs_than_fit_as_integers():
    """The integers of so many inputs leave no room for the weight: float16 serves, not the slow plain kernel."""
    in_features, out_features = 131072, 128
    weight = Weight(out_features, in_features, 4, 128, False)
    if torch.cuda.get_device_capability()[0] == 9:
        shape = {"in_features": in_features, "out_features": out_features, "weight_format": weight.format}
        assert tuning.choice_by_rules(rows=1, **shape) == "stream_quantized"
    for rows in (1, 2):
        x = strided(rows, in_features, torch.float16)
        expected = reference(x, weight.values, None, None)
        for name in NAMES:
            check(f"{name}, {rows} rows", multiply(name, x, weight), *expected)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_with_what_is_not_finite_changes_no_other_row(dtype, value):
    weight = Weight(336, 1024, 4, 128, False)
    x = make(2, 1024, dtype=dtype, device="cuda")
    x[1, 700] = value
    expected, size = reference(x[:1], weight.values, None, None)
    for name in NAMES:
        y = multiply(name, x, weight)
        check(name, y[:1], expected, size)
        assert not y[1].isfinite().any()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64])
def test_repeats_its_bits_and_takes_any_address_of_y(bits, rows):
    weight = Weight(3584, 3584, bits, 128, False)
    x = strided(rows, 3584, torch.float16)
    expected = reference(x, weight.values, None, None)
    for name in NAMES:
        y = multiply(name, x, weight)
        check(name, y, *expected)
        assert torch.equal(multiply(name, x, weight), y)
        assert torch.equal(multiply(name, x, weight, offset=1), y)


@hopper
@pytest.mark.gpu
def test_what_it_cannot_compute_falls_to_the_rules():
    for in_features, out_features, activation in ((77, 40, None), (640, 72, "swiglu")):
        weight = Weight(out_features, in_features, 4, 0, True)
        x = strided(3, in_features, torch.float16)
        expected = reference(x, weight.values, None, activation)
        check("rules", multiply("stream_quantized", x, weight, None, activation), *expected)
    weight = Weight(256, 640, 4, 128, False)
    x = strided(3, 648, torch.float16)[:, 4:644]  # not aligned
    check("rules", multiply("stream_quantized", x, weight), *reference(x, weight.values, None, None))


@hopper
@pytest.mark.gpu
def test_captured_launches_that_read_each_others_results():
    weights = [Weight(2048, 2048, 4, 128, False, lowest=1) for _ in range(2)]
    x = strided(5, 2048, torch.float16)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    outputs = []
    with torch.cuda.graph(graph):
        h = x
        for i in range(12):
            h = multiply_captured(NAMES[1 + i], h, weights[i % 2])
            outputs.append(h)
    for _ in range(3):
        x.copy_(strided(5, 2048, torch.float16))
        graph.replay()
        assert outputs[-1].isfinite().all()
        h = x
        for i, y in enumerate(outputs):
            check(NAMES[1 + i], y, *reference(h, weights[i % 2].values, None, None))
            h = y


def multiply_captured(name, x, weight):
    layer = launch.LinearLayer(
        weight=weight.codes.data_ptr(),
        scales=weight.scales.data_ptr(),
        weight_format=weight.format.for_launch(),
        bias=0,
        in_features=x.shape[1],
        out_features=2048,
        activation=launch.Activation.none,
        dtype=launch.DataType.float16,
        constant_weight=True,
        kernels=[(x.shape[0], name)],
    )
    y = x.new_empty(x.shape[0], layer.columns)
    stream = torch.cuda.current_stream().cuda_stream
    addresses = {"x": x.data_ptr(), "y": y.data_ptr(), "workspace": 0, "stream": stream}
    launch.gemm(layer, x_row_stride=x.stride(0), rows=x.shape[0], **addresses)
    return y


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_candidates_and_measurement(activation):
    weight_format = quantized.WeightFormat(4, 128)
    shape = {"in_features": 3584, "out_features": 4608, "activation": activation, "weight_format": weight_format}
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    assert tuning.choice_by_rules(rows=1, **shape) == "stream_quantized"
    names = tuning.candidates(rows=1, **shape)
    assert 2 <= len(names) <= 12
    assert set(names) <= set(NAMES)
    times = measure_undisturbed(rows=1, **shape)
    assert set(times) == set(names)
    assert all(0.5 < time < 100 for time in times.values())
