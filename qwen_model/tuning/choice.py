"""Choose GEMM kernels by their measured times."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import NOT_QUANTIZED, Formats
from ..common.progress import GEMM_KERNELS, Progress
from ..interface.engine_config import GemmKernels, KernelChoices, Limits
from ..interface.weight_formats import kernel_format
from ..network.inputs import logit_rows
from .linear_layers import LinearShape, linear_layers
from .timings import GemmTimings, Microseconds, user_timings

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
"""Numbers of rows that are measured: each stands for those from the one before it on."""
MANY_ROWS = 2**31 - 1
RULES = "rules"
"""The name by which the kernels' own rules are chosen."""
BUDGET_SECONDS = 20.0
LOG = logging.getLogger(__name__)


class Measurement(Protocol):
    """Define the functions of `qwen_plugins.tuning` that are used here."""

    def environment(self) -> dict[str, str | int]:
        """Return what times depend on: GPU, driver, and versions of cuBLASLt and of the kernels."""

    def candidates(
        self, *, rows: int, in_features: int, out_features: int, activation: str | None, dtype: str
    ) -> list[str]:
        """Return the kernels that can compute this GEMM."""

    def measure(
        self, *, rows: int, in_features: int, out_features: int, activation: str | None, dtype: str, bias: bool
    ) -> Microseconds:
        """Time every kernel that can compute this GEMM."""


def choose_kernels(
    model: ModelConfig,
    limits: Limits,
    dtype: str,
    progress: Progress,
    measurement: Measurement | None = None,
    formats: Formats = NOT_QUANTIZED,
) -> GemmKernels:
    """Return the kernels of each shape of a linear layer, measured on the current GPU or read from the user's file.

    measurement: None: `qwen_plugins.tuning`.
    formats: of the quantized modules.

    Shapes that could not be measured, in time or in the free memory, are left out: rules choose their kernels.
    """
    gpu: Any = _gpu() if measurement is None else measurement
    most_rows = rows_of_shapes(model, limits, dtype, formats)
    timings = user_timings(gpu.environment())
    wanted = [(shape, rows) for shape, most in most_rows.items() for rows in buckets(most)]
    _measure_missing(gpu, timings, wanted, progress)
    timings.keep()
    chosen = {shape.text: _choices(gpu, timings, shape, most) for shape, most in most_rows.items()}
    return {text: choices for text, choices in chosen.items() if choices}


def by_module(
    model: ModelConfig, dtype: str, kernels: GemmKernels, formats: Formats = NOT_QUANTIZED
) -> dict[str, KernelChoices]:
    """Return the chosen kernels of each linear layer that has any, by its module."""
    layers = linear_layers(model, dtype, formats)
    return {name: kernels[shape.text] for name, shape in layers.items() if shape.text in kernels}


def rows_of_shapes(
    model: ModelConfig, limits: Limits, dtype: str, formats: Formats = NOT_QUANTIZED
) -> dict[LinearShape, int]:
    """Return the shapes of the network's linear layers, and the most rows of x that each meets."""
    prompt_rows = limits.step_tokens
    most: dict[LinearShape, int] = {}
    for name, shape in linear_layers(model, dtype, formats).items():
        rows = logit_rows(limits) if name == "lm_head" else prompt_rows
        most[shape] = max(rows, most.get(shape, 0))
    return most


def buckets(most_rows: int) -> list[int]:
    """Return the numbers of rows to measure for up to `most_rows` rows."""
    below = [rows for rows in ROWS if rows < most_rows]
    return [*below, *[rows for rows in ROWS if rows >= most_rows][:1]]


def _gpu() -> Any:
    from qwen_plugins import tuning

    return tuning


def _measure_missing(
    gpu: Measurement, timings: GemmTimings, wanted: Iterable[tuple[LinearShape, int]], progress: Progress
) -> None:
    # The rows of all shapes in turn, few rows first: those of decode steps, should time run out.
    missing = sorted((pair for pair in wanted if timings.get(*pair) is None), key=lambda pair: pair[1])
    if not missing:
        return
    start = time.perf_counter()
    for done, (shape, rows) in enumerate(missing):
        progress(GEMM_KERNELS, done, len(missing))
        if time.perf_counter() - start > BUDGET_SECONDS:
            left = len(missing) - done
            LOG.warning("%d of %d products were not measured in %.0f s", left, len(missing), BUDGET_SECONDS)
            break
        try:
            times = gpu.measure(rows=rows, bias=shape.bias, **_arguments(shape))
        except (RuntimeError, MemoryError) as error:  # mostly: too little memory is free
            LOG.warning("%s, %d rows: not measured: %s", shape.text, rows, error)
            continue
        timings.put(shape, rows, times)
    progress(GEMM_KERNELS, len(missing), len(missing))
    LOG.info("timed the GEMM kernels of %d shapes in %.1f s", len(missing), time.perf_counter() - start)


def _arguments(shape: LinearShape) -> dict[str, Any]:
    quantized: dict[str, Any] = {}
    if shape.weight_format is not None:
        quantized = {"weight_format": kernel_format(shape.weight_format)}
    if shape.quantized_y:
        quantized["quantized_y"] = True
    return {
        "in_features": shape.in_features,
        "out_features": shape.out_features,
        "activation": shape.activation,
        "dtype": shape.dtype,
        **quantized,
    }


def _choices(gpu: Measurement, timings: GemmTimings, shape: LinearShape, most_rows: int) -> KernelChoices:
    found: list[tuple[int, str]] = []
    for rows in buckets(most_rows):
        known = gpu.candidates(rows=rows, **_arguments(shape))  # a file may name others
        times = {name: time for name, time in (timings.get(shape, rows) or {}).items() if name in known}
        # "rules" keeps a later bucket's kernel from serving rows that were not measured.
        chosen = min(times, key=lambda name: times[name]) if times else RULES
        if found and found[-1][1] == chosen:
            found.pop()
        found.append((rows, chosen))
    if found[-1][0] == ROWS[-1]:
        found[-1] = (MANY_ROWS, found[-1][1])
    return () if all(name == RULES for _, name in found) else tuple(found)


@dataclass(frozen=True)
class KernelRange:
    """Say which GEMM kernel serves a range of rows; `last_row` is None where the range has no end."""

    first_row: int
    last_row: int | None
    kernel: str


def ranges(choices: KernelChoices) -> list[KernelRange]:
    """Return the ranges of rows of a layer's choices, up to any number of rows."""
    found, first = [], 1
    for last, kernel in choices:
        found.append(KernelRange(first, None if last == MANY_ROWS else last, kernel))
        first = last + 1
    if not choices or choices[-1][0] != MANY_ROWS:
        found.append(KernelRange(first, None, RULES))
    return found
