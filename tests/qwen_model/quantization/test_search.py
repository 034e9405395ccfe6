"""Scales are searched: the error is at most that of the largest number's scale, and near the least there is."""

import numpy as np
import pytest

from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.quantization.search import round_weight

GROUPS = {"int4": (32, 64, 128, 0), "int8": (0, 128)}


def weight_of(rows=48, columns=384, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (rows, columns)) * rng.lognormal(0, 1, (rows, 1)) * 0.02).astype(dtype)


def nearest(weight, scale, zero, top):
    return (np.clip(np.rint(weight / scale) + zero, 0, top) - zero) * scale


def error_by_largest(weight, size, bits):
    groups = weight.astype(np.float32).reshape(len(weight), -1, size or weight.shape[1])
    middle = 2 ** (bits - 1)
    scale = np.abs(groups).max(2, keepdims=True) / (middle - 1)
    return float(((nearest(groups, scale, middle, 2 * middle - 1) - groups) ** 2).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "size"), [(kind, size) for kind, sizes in GROUPS.items() for size in sizes])
def test_the_error_is_less_than_with_the_largest_numbers_scale(kind, size, scale_dtype, symmetric):
    weight = weight_of()
    rounded = round_weight(weight, WeightFormat(kind, size, symmetric, layout=2, scale_dtype=scale_dtype))
    quantized = rounded.weight
    quantized.check("a layer")
    assert quantized.format == WeightFormat(kind, size, symmetric, layout=2, scale_dtype=scale_dtype)
    wide = weight.astype(np.float32)
    error, total = float(((quantized.dequantized() - wide) ** 2).sum()), float((wide**2).sum())
    assert error == pytest.approx(rounded.squared_error, rel=1e-4)
    assert rounded.relative_error == pytest.approx((error / total) ** 0.5, rel=1e-4)
    assert error < (0.9 if kind == "int4" else 1.01) * error_by_largest(weight, size, quantized.bits)


def test_near_the_least_error_of_every_scale():
    """Against 2000 scales of each group, without a limit of their type."""
    weight = weight_of(rows=8, columns=128).astype(np.float32)
    rounded = round_weight(weight, WeightFormat("int4", 0, layout=2, scale_dtype="float16"))
    scales = np.abs(weight).max(1, keepdims=True) / 7 * np.linspace(0.3, 1.05, 2000)[:, None, None]
    least = ((nearest(weight, scales, 8, 15) - weight) ** 2).sum(2).min(0).sum()
    assert rounded.squared_error < 1.03 * least


def test_the_largest_numbers_count_where_their_input_is_important():
    weight = weight_of(rows=16, columns=128)
    weight[:, 5] *= 30
    importance = np.full(128, 1e-6, np.float32)
    importance[5] = 1.0
    plain = round_weight(weight, WeightFormat("int4", 0, layout=2, scale_dtype="float16"))
    aware = round_weight(weight, WeightFormat("int4", 0, layout=2, scale_dtype="float16"), importance)
    errors = [np.abs(each.weight.dequantized() - weight)[:, 5].max() for each in (plain, aware)]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_groups_of_one_value(kind, symmetric):
    """Zeros stay zeros, and a constant is exact but for the scale's rounding."""
    weight = np.zeros((4, 64), np.float32)
    weight[1], weight[2], weight[3, 7] = 0.5, -0.25, 3.0
    rounded = round_weight(weight, WeightFormat(kind, 32, symmetric, layout=2, scale_dtype="float16"))
    rounded.weight.check("a layer")
    np.testing.assert_allclose(rounded.weight.dequantized(), weight, rtol=5e-4)


def test_numbers_too_small_for_the_scales_type_become_zero():
    rounded = round_weight(np.full((2, 64), 1e-9, np.float32), WeightFormat("int4", layout=2, scale_dtype="float16"))
    rounded.weight.check("a layer")
    assert not rounded.weight.dequantized().any()
