"""The kernel of 8-bit tiles, each variant by its name, against float64; numbers, candidates."""

from __future__ import annotations

import pytest
import torch

from qwen_plugins import launch, tuning
from qwen_plugins.quantized import WeightFormat
from tests.qwen_plugins.gemm_reference import ACTIVATIONS, HALF_TYPES
from tests.qwen_plugins.scaled_gemm_reference import CODE_TYPES, Layer, check
from tests.qwen_plugins.test_stream_eight_bit import multiply, strided

INT8, FP8 = CODE_TYPES
WEIGHTS = [(INT8, False), (FP8, False), (FP8, True)]
COLUMNS = (128, 192, 256)
CLUSTERS = {"": 1, "r2": 2, "c2": 3}
SPLITS = {"s1": 1, "s2": 2, "s3": 3, "s4": 4, "s6": 6, "s8": 8, "l": 14}
# With the numbers that engines hold.
VARIANTS = {
    f"n{columns}{cluster}{splits}": columns // 32 * 64 + number * 16 + split
    for columns in COLUMNS
    for cluster, number in CLUSTERS.items()
    for splits, split in SPLITS.items()
}
NAMES = ["tiles_eight_bit", *(f"tiles_eight_bit:{variant}" for variant in VARIANTS)]
SUM_ERROR = 2.0**-12  # Hopper's tensor cores add products of float8 in registers of 14 bits
pytestmark = pytest.mark.skipif(not launch.has_hopper_kernels(), reason="for Hopper's kernels")


def test_numbers_of_the_names():
    numbers = {f"tiles_eight_bit:{variant}": 0xA0000 + number for variant, number in VARIANTS.items()}
    assert {name: launch.gemm_choice_number(name) for name in numbers} == numbers


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("code_type", "blocks"), WEIGHTS)
def test_every_variant_matches_float64(dtype, activation, code_type, blocks):
    y_scale = torch.tensor([0.021], device="cuda")
    # Few chunks of k and many, the last of 16 k; columns that end within a tile, and within a slot of it.
    for in_features, out_features in ((256, 128), (1040, 416), (5136, 1568), (656, 896)):
        layer = Layer(in_features, out_features, code_type=code_type, blocks=blocks)
        for turn, rows in enumerate((1, 65, 127, 200, 300, 513)):
            x, scales, bias = layer.operands(rows, dtype=dtype, bias=turn % 2 > 0, per_row=turn % 3 > 0)
            x = strided(x)
            for i, name in enumerate(NAMES):
                scale = y_scale if (i + turn) % 2 else None
                y = multiply(name, layer, x, scales, bias, activation, dtype=dtype, y_scale=scale)
                check(y, x, scales, layer, bias, activation, y_scale=scale, sum_error=SUM_ERROR)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("code_type", "blocks"), WEIGHTS)
def test_prompts_match_float64(activation, code_type, blocks):
    layer = Layer(3584, 9472 if activation else 4608, code_type=code_type, blocks=blocks)
    for rows in (129, 1000, 2048, 8192):
        x, scales, bias = layer.operands(rows)
        for name in ("rules", "tiles_eight_bit", "tiles_eight_bit:n128r2l"):
            y = multiply(name, layer, x, scales, bias, activation)
            check(y, x, scales, layer, bias, activation, sum_error=SUM_ERROR)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_sums_of_float8_are_promoted(blocks):
    layer = Layer(5136, 1568, code_type=FP8, blocks=blocks)
    x, scales, _ = layer.operands(200)
    # With codes of one sign, what the tensor cores cut off adds up: 0.05 % where each 128 k are added in float32,
    # 0.17 % with 256 k, and 7 % of a sum that stays in the tensor cores.
    layer.codes, layer.weight, x = layer.codes.float().abs().to(FP8), layer.weight.abs(), x.float().abs().to(FP8)
    expected = (x.float().double() * scales) @ layer.weight.T
    for name in NAMES:
        error = multiply(name, layer, x, scales) / expected - 1
        assert error.mean().abs() < 0.001, name


@pytest.mark.gpu
@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_repeats_its_bits(code_type):
    layer = Layer(3584, 3584, code_type=code_type)
    x, scales, bias = layer.operands(300)
    for name in NAMES:
        y = multiply(name, layer, x, scales, bias)
        for _ in range(3):
            assert torch.equal(multiply(name, layer, x, scales, bias), y)


@pytest.mark.gpu
def test_int8_is_the_same_in_every_variant():
    layer = Layer(3584, 4608, code_type=INT8)
    x, scales, bias = layer.operands(200)
    expected = multiply("plain", layer, x, scales, bias)
    for name in NAMES:
        assert torch.equal(multiply(name, layer, x, scales, bias), expected)


@pytest.mark.gpu
def test_what_it_cannot_compute_falls_to_the_rules():
    for in_features, out_features, code_type, blocks, activation in (
        (72, 40, INT8, False, None),
        (640, 24, FP8, False, "swiglu"),
        (640, 416, FP8, True, "swiglu"),
    ):
        layer = Layer(in_features, out_features, code_type=code_type, blocks=blocks)
        x, scales, bias = layer.operands(100)
        y = multiply("tiles_eight_bit", layer, x, scales, bias, activation)
        check(y, x, scales, layer, bias, activation, sum_error=SUM_ERROR)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["int8", "fp8"])
def test_candidates_and_rules(activation):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    shape = {"in_features": 3584, "out_features": 4608}
    shape["weight_format"] = WeightFormat(8, scale_dtype="float32", activation=activation)
    for rows in (256, 512, 8192):
        assert tuning.choice_by_rules(rows=rows, **shape) == "tiles_eight_bit"
        assert len(set(tuning.candidates(rows=rows, **shape)) & set(NAMES)) == 6
    # Two waves of tiles instead of three or four.
    shape["out_features"] = 3584
    assert "tiles_eight_bit:n256s1" in tuning.candidates(rows=2048, **shape)


def test_layers_that_are_not_divided_need_no_room_for_sums():
    def workspace_bytes(in_features, rows):
        layer = launch.LinearLayer(
            weight=4096,
            scales=4096,
            bias=0,
            in_features=in_features,
            out_features=96,
            activation=launch.Activation.none,
            dtype=launch.DataType.float16,
            constant_weight=True,
            kernels=[(2**29, "tiles_eight_bit")],
            weight_format=WeightFormat(8, 0, scale_dtype="float32", activation="int8").for_launch(),
        )
        return layer.workspace_bytes(rows)

    cublas_lt = 32 << 20  # which the rules may choose, and the sums of its rows
    for rows in (1, 100, 5000):
        assert workspace_bytes(256, rows) == cublas_lt + 4 * 96 * rows
    few, many = (workspace_bytes(4096, rows) for rows in (1, 5000))
    assert cublas_lt + 4 * 96 <= few <= many == 40 << 20
