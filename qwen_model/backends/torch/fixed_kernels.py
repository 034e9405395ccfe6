"""Choose GEMM kernels by which a row's result has the same bits, however many rows are multiplied with it.

Among others the number of rows decides which kernel is the fastest and whether it splits k, and so in which order
products are added. Here all rows have one order: that of a Hopper kernel for few rows with tiles of 64 rows of x, which
does not split k, or else that of the plain kernel.
"""

from __future__ import annotations

import math

from ...interface.engine_config import KernelChoices

TILE_ROWS = 64  # of x
MOST_WEIGHT_ROWS = {"": 256, "int8": 256, "fp8": 192}  # of a tile, by the kind that x is quantized to
MOST_TILES = 16  # of x in one launch: with more, the weight is read from the L2 cache too often
WAVES = (1, 2, 3, 4, 6, 8, 12, 16)  # tiles of a block, in which the kernel's variants differ
ANY_ROWS = 2**31 - 1
PLAIN: KernelChoices = ((ANY_ROWS, "plain"),)


def tiled_kernels(out_features: int, swiglu: bool, multiprocessors: int, activation: str = "") -> KernelChoices:
    """Return the variants of a streaming kernel, each with the most rows that it is for, without a gap.

    More rows than the last is for must be multiplied in several launches.

    activation: what x and the weight are quantized to, "int8" or "fp8"; "": they are not.
    """
    kernel = "stream_eight_bit" if activation else "stream_hopper"
    unit = 16 if swiglu else 8  # rows of the weight that belong together
    choices: list[tuple[int, str]] = []
    for tiles in range(1, MOST_TILES + 1):
        most = MOST_WEIGHT_ROWS[activation]
        fits = [waves for waves in WAVES if _weight_rows(out_features, multiprocessors * waves // tiles, unit, most)]
        if not fits:
            break
        waves = "" if fits[0] == 1 else f"w{fits[0]}"
        choices.append((tiles * TILE_ROWS, f"{kernel}:n{TILE_ROWS}s1{waves}"))
    return tuple(choices) or PLAIN


def _weight_rows(out_features: int, blocks: int, unit: int, most: int) -> int:
    """Return the weight rows of each of so many tiles; 0: a tile cannot have as many."""
    if blocks == 0:
        return 0
    rows = math.ceil(out_features / blocks / unit) * unit
    return rows if rows <= most else 0
