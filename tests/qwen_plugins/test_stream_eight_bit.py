"""The kernel that streams 8-bit weights for 8-bit x, each variant by its name, against float64; numbers, candidates."""

from __future__ import annotations

import pytest
import torch

from qwen_plugins import launch, tuning
from qwen_plugins.quantized import WeightFormat
from tests.qwen_plugins.gemm_reference import ACTIVATIONS, HALF_TYPES, measure_undisturbed
from tests.qwen_plugins.scaled_gemm_reference import CODE_TYPES, Layer, check, launch_kernel, random_codes

INT8, FP8 = CODE_TYPES
WEIGHTS = [(INT8, False), (FP8, False), (FP8, True)]
X_ROWS = (8, 16, 24, 32, 48, 64, 96, 128)
WAVES = (1, 2, 3, 4, 6, 8, 12, 16)
# How k is split, or tiles are divided, with the numbers that engines hold.
DIVISIONS = {f"s{splits}": 8 * (splits - 1) for splits in range(1, 9)}
DIVISIONS |= {f"s1w{waves}": number for number, waves in enumerate(WAVES) if number > 0}
VARIANTS = {
    f"n{x_rows}{division}{'h' if half else ''}": half * 4096 + x_rows * 8 + number
    for half in (0, 1)
    for x_rows in X_ROWS
    for division, number in DIVISIONS.items()
}
NAMES = ["stream_eight_bit", *(f"stream_eight_bit:{variant}" for variant in VARIANTS)]
SUM_ERROR = 2.0**-12  # Hopper's tensor cores add products of float8 in registers of 14 bits
hopper = pytest.mark.skipif(not launch.has_hopper_kernels(), reason="for Hopper's kernels")


def multiply(name, layer, x, x_scales, bias=None, activation=None, *, dtype=torch.float16, y_scale=None, offset=0):
    """Compute y with a kernel and check what surrounds y, which begins `offset` elements behind an aligned address."""
    rows, columns = x.shape[0], layer.shape[0] // (2 if activation else 1)
    end = offset + rows * columns
    out = torch.full((end + 64,), 1.5 if y_scale is None else 85, device="cuda").to(
        dtype if y_scale is None else torch.int8
    )
    poison = out[-1].item()
    y = out[offset:end].view(rows, columns)
    y = y if y_scale is None else y.view(layer.code_type)
    launch_kernel(name, layer, x, x_scales, bias, activation, y, dtype=dtype, y_scale=y_scale)
    assert (out[:offset] == poison).all()
    assert (out[end:] == poison).all()
    return y


def strided(x):
    """Return the same x among other codes (of e4m3: NaN), which the kernel must not read."""
    rows, in_features = x.shape
    storage = torch.full((rows + 1, in_features + 16), 127, dtype=torch.uint8, device="cuda").view(x.dtype)
    storage.view(torch.uint8)[:rows, :in_features] = x.view(torch.uint8)
    return storage[:rows, :in_features]


@hopper
def test_numbers_of_the_names():
    numbers = {f"stream_eight_bit:{variant}": 0xB0000 + number for variant, number in VARIANTS.items()}
    assert {name: launch.gemm_choice_number(name) for name in numbers} == numbers


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("code_type", "blocks"), WEIGHTS)
def test_every_variant_matches_float64(dtype, activation, code_type, blocks):
    y_scale = torch.tensor([0.021], device="cuda")
    # Few chunks of k and many, the last of 16 and of 64 k; rows that are no multiple of a tile's.
    for in_features, out_features in ((16, 48), (656, 448), (5184, 4256 if activation else 3581)):
        layer = Layer(in_features, out_features, code_type=code_type, blocks=blocks)
        for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 100, 130):
            x, scales, bias = layer.operands(rows, dtype=dtype, bias=rows % 2 > 0, per_row=rows % 3 > 0)
            x = strided(x)
            for i, name in enumerate(NAMES):
                if (i + rows) % 8 > 0 and i > 0:  # an eighth of the variants with each number of rows
                    continue
                scale = y_scale if (i // 8 + rows) % 2 else None
                y = multiply(name, layer, x, scales, bias, activation, dtype=dtype, y_scale=scale)
                check(y, x, scales, layer, bias, activation, y_scale=scale, sum_error=SUM_ERROR)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_repeats_its_bits_and_takes_any_address_of_y(code_type, rows):
    layer = Layer(3584, 3584, code_type=code_type)
    x, scales, bias = layer.operands(rows)
    for y_scale in (None, torch.tensor([0.03], device="cuda")):
        for name in NAMES:
            y = multiply(name, layer, x, scales, bias, y_scale=y_scale)
            for offset in (0, 1):
                again = multiply(name, layer, x, scales, bias, y_scale=y_scale, offset=offset)
                assert torch.equal(again.view(torch.int8), y.view(torch.int8))


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33])
def test_int8_is_the_same_in_every_variant(rows):
    layer = Layer(3584, 4608, code_type=INT8)
    x, scales, bias = layer.operands(rows)
    expected = multiply("plain", layer, x, scales, bias)
    for name in NAMES:
        assert torch.equal(multiply(name, layer, x, scales, bias), expected)


@hopper
@pytest.mark.gpu
def test_what_it_cannot_compute_falls_to_the_rules():
    for in_features, out_features, activation in ((72, 40, None), (640, 24, "swiglu")):
        layer = Layer(in_features, out_features, code_type=INT8)
        x, scales, bias = layer.operands(3)
        y = multiply("stream_eight_bit", layer, x, scales, bias, activation)
        check(y, x, scales, layer, bias, activation)
    layer = Layer(640, 256, code_type=FP8)
    x = random_codes(3, 648, dtype=FP8, device="cuda")[:, 8:]  # not aligned
    scales = torch.full((3, 1), 0.01, device="cuda")
    check(multiply("stream_eight_bit", layer, x, scales), x, scales, layer, None, None, sum_error=SUM_ERROR)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_candidates_and_measurement(activation):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    weight_format = WeightFormat(8, scale_dtype="float32", activation=activation)
    shape = {"in_features": 3584, "out_features": 4608, "weight_format": weight_format}
    assert tuning.choice_by_rules(rows=1, **shape) == "stream_eight_bit"
    names = tuning.candidates(rows=1, **shape)
    assert len(set(names) & set(NAMES)) == 6
    times = measure_undisturbed(rows=1, **shape)
    assert set(times) == set(names)
    assert all(0.5 < time < 100 for time in times.values())
