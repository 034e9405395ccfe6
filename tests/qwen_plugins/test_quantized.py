"""Packing of quantized weights, against an independent writing of the layout in NumPy; arguments that are refused."""

from __future__ import annotations

import time

import ml_dtypes
import numpy as np
import pytest

from qwen_plugins import quantized

RNG = np.random.default_rng(17)


def make(out_features, in_features, bits, group_size, has_zeros=False, scale_dtype=np.float16):
    groups = in_features // group_size if group_size else 1
    codes = RNG.integers(0, 2**bits, (out_features, in_features), dtype=np.uint8)
    scales = RNG.uniform(0.01, 1.0, (out_features, groups)).astype(scale_dtype)
    zeros = RNG.integers(0, 2**bits, (out_features, groups), dtype=np.uint8) if has_zeros else None
    return codes, scales, zeros


def element(bits, row, k):
    """Return where a code lies: superblock of k, superblock of rows, word in it, and bit of the word.

    Written from the operands of mma.m16n8k16: of lane 4 g + t, register 0 has row g and k 2 t, 2 t + 1; register 1 the
    row g + 8; registers 2 and 3 likewise the k 2 t + 8, 2 t + 9.
    """
    step, k_in_step = divmod(k % 128, 16)  # the mma that multiplies it
    register = (row % 16 >= 8) + 2 * (k_in_step >= 8)
    lane = row % 8 * 4 + k_in_step % 8 // 2
    upper = k_in_step % 2
    steps_of_block, steps_of_word = (4, 2) if bits == 4 else (2, 1)
    block, step_in_block = divmod(step, steps_of_block)
    word = block * 128 + lane * 4 + register % 2 * 2 + step_in_block // steps_of_word
    bit = upper * 16 + bits * (step_in_block % steps_of_word * 2 + register // 2)
    return k // 128, row // 16, word, bit


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out_features", "in_features", "group_size"), [(70, 160, 32), (64, 256, 128), (3, 77, 0)])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_layout(bits, out_features, in_features, group_size, has_zeros):
    codes, scales, zeros = make(out_features, in_features, bits, group_size, has_zeros)
    packed = quantized.pack(codes, scales, zeros, bits=bits, group_size=group_size)
    rows, k = -(-out_features // 64) * 64, -(-in_features // 128) * 128
    groups = k // group_size if group_size else 1
    middle = 2 ** (bits - 1)
    expected_scales = np.zeros((groups, rows), np.float16)
    expected_zeros = np.full((groups, rows), middle, np.uint8)
    expected_scales[: scales.shape[1], :out_features] = scales.T
    if zeros is not None:
        expected_zeros[: scales.shape[1], :out_features] = zeros.T
    expected_codes = np.zeros((k // 128, rows // 16, 64 * bits), np.uint32)
    for row in range(rows):
        for column in range(k):
            inside = row < out_features and column < in_features
            code = codes[row, column] if inside else expected_zeros[column // group_size if group_size else 0, row]
            chunk, block, word, bit = element(bits, row, column)
            expected_codes[chunk, block, word] |= np.uint32(int(code) << bit)
    assert packed.codes.dtype == np.int32
    assert np.array_equal(packed.codes.view(np.uint32), expected_codes)
    assert packed.scales.dtype == np.float16
    assert np.array_equal(packed.scales, expected_scales)
    assert (packed.zeros is None) == (zeros is None)
    if zeros is not None:
        assert np.array_equal(packed.zeros, expected_zeros)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"), [(1, 1, 0), (517, 2080, 32), (130, 1088, 64), (96, 896, 128)]
)
@pytest.mark.parametrize("has_zeros", [False, True])
def test_unpack_gives_back_what_was_packed(bits, scale_dtype, out_features, in_features, group_size, has_zeros):
    codes, scales, zeros = make(out_features, in_features, bits, group_size, has_zeros, scale_dtype)
    packed = quantized.pack(codes, scales, zeros, bits=bits, group_size=group_size)
    assert packed.format == quantized.WeightFormat(bits, group_size, has_zeros, np.dtype(scale_dtype).name)
    for given, back in zip((codes, scales, zeros), quantized.unpack(packed), strict=True):
        assert (given is None and back is None) or (given.dtype == back.dtype and np.array_equal(given, back))
    weight = quantized.dequantize(packed)
    for row, column in ((0, 0), (out_features - 1, in_features - 1)):
        group = column // group_size if group_size else 0
        zero = 2 ** (bits - 1) if zeros is None else int(zeros[row, group])
        assert weight[row, column] == float(scales[row, group]) * (int(codes[row, column]) - zero)


def test_larger_groups_become_groups_of_128():
    codes, scales, zeros = make(40, 768, 4, 384, has_zeros=True)
    packed = quantized.pack(codes, scales, zeros, bits=4, group_size=384)
    assert packed.format.group_size == 128
    expected = np.repeat(scales, 384, 1).astype(np.float32) * (codes - np.repeat(zeros, 384, 1).astype(np.float32))
    assert np.array_equal(quantized.dequantize(packed), expected)


def test_views_that_are_not_contiguous():
    codes, scales, _ = make(64, 256, 4, 128)
    packed = quantized.pack(codes.T.copy().T, scales.T.copy().T, bits=4, group_size=128)
    assert np.array_equal(packed.codes, quantized.pack(codes, scales, bits=4, group_size=128).codes)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"bits": 3}, ValueError, "bits must be 4 or 8, not 3"),
        ({"group_size": 48}, ValueError, "group_size must divide in_features, but 256 columns are no groups of 48"),
        (
            {"group_size": 16, "scales": np.ones((64, 16), np.float16)},
            ValueError,
            "group_size must be 32, 64, 128 or 0",
        ),
        ({"codes": np.full((64, 256), 16, np.uint8)}, ValueError, "codes must be below 16 with 4 bits, but one is 16"),
        ({"codes": np.ones((64, 256), np.int8)}, TypeError, "codes must be uint8, not int8"),
        ({"codes": np.ones(64, np.uint8)}, ValueError, "codes must have 2 dimensions"),
        ({"codes": [[1]]}, TypeError, "codes must be a NumPy array, not list"),
        ({"scales": np.ones((64, 2), np.float32)}, TypeError, "scales must be float16 or bfloat16, not float32"),
        ({"scales": np.ones((64, 3), np.float16)}, ValueError, r"scales must have the shape \(64, 2\), not \(64, 3\)"),
        ({"zeros": np.ones((2, 64), np.uint8)}, ValueError, r"zeros must have the shape \(64, 2\), not \(2, 64\)"),
        ({"zeros": np.full((64, 2), 99, np.uint8)}, ValueError, "zeros must be below 16 with 4 bits, but one is 99"),
    ],
)
def test_bad_arguments(changed, error, message):
    arguments = {"codes": np.ones((64, 256), np.uint8), "scales": np.ones((64, 2), np.float16), "bits": 4}
    arguments["group_size"] = 128
    with pytest.raises(error, match=message):
        quantized.pack(**{**arguments, **changed})


def test_packing_is_fast():
    # 7B weights take well under a minute; a tenth of the usual speed still passes.
    codes, scales, _ = make(4096, 4096, 4, 128)
    quantized.pack(codes[:64], scales[:64], bits=4, group_size=128)
    start = time.perf_counter()
    quantized.pack(codes, scales, bits=4, group_size=128)
    assert time.perf_counter() - start < 1.0
