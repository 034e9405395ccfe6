"""The GEMM kernels of deterministic devices, by the number of rows."""

import pytest

from qwen_model.backends.torch.fixed_kernels import MOST_WEIGHT_ROWS, PLAIN, tiled_kernels


@pytest.mark.parametrize("out_features", [96, 896, 3584, 4608, 37888, 152064])
@pytest.mark.parametrize("multiprocessors", [132, 78])
@pytest.mark.parametrize("activation", ["", "int8", "fp8"])
def test_all_tiles_fit(out_features, multiprocessors, activation):
    """A launch has tiles of 64 rows of x, and of no more rows of the weight than a block can have."""
    kernels = tiled_kernels(out_features, False, multiprocessors, activation)
    assert kernels != PLAIN
    assert [rows for rows, _ in kernels] == [64 * (i + 1) for i in range(len(kernels))]
    for rows, name in kernels:
        kernel, _, variant = name.partition(":n64s1")
        assert kernel == ("stream_eight_bit" if activation else "stream_hopper")
        waves = int(variant.removeprefix("w") or 1)
        columns_of_tiles = multiprocessors * waves // (rows // 64)
        assert columns_of_tiles * MOST_WEIGHT_ROWS[activation] >= out_features


def test_a_weight_that_is_too_large():
    assert tiled_kernels(10**7, False, 132) == PLAIN
