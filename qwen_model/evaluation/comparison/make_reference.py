"""Make a reference: run the network plainly in float64, check it against the original, and measure PyTorch's errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ...checkpoints.config import ModelConfig
from ...common.errors import QwenModelError
from ...common.progress import Progress, no_progress
from ...interface.probe import Array
from .case import LINEAR_INPUTS, kind_of
from .diagnosis import likely_reason
from .errors import LIMIT, ROUNDING, Error, error_of
from .original import OriginalNetwork, find_original
from .passes import chained_errors, isolated_errors
from .plain import PlainProbe
from .reference import (
    CheckpointModules,
    Finding,
    Passes,
    ReadArrays,
    Reference,
    StepErrors,
    result_names,
    samples_of,
)

ATTENTION_DRAWS = 8
NORM_TOLERANCE = 1e-6
"""The relative error of the original in float64: its norms compute in float32."""
ANGLE_TOLERANCE = 4e-7
"""What each position adds to the error of rotated heads: the original computes angles in float32."""
ATTENTION_FACTOR = 30
"""How many times larger errors of scores, sums over a head's elements, may be than those of its heads."""


def make_reference(
    model_dir: Path,
    prompt: Sequence[int],
    num_steps: int,
    dtypes: Collection[str],
    progress: Progress = no_progress,
) -> Reference:
    """Compute the reference of a checkpoint for a prompt and the `num_steps` likeliest tokens after it.

    dtypes: the types of the engines that it is for.
    progress: called with a phase, and the number of operations done and in all.

    Raises:
        QwenModelError: the checkpoint cannot be read or is not supported, or the prompt does not fit the model.
    """
    config = ModelConfig.from_model_dir(model_dir)
    _check_prompt(config, prompt, num_steps)
    modules = CheckpointModules(model_dir, config, "torch")

    def plain(dtype: str, phase: str) -> PlainProbe:
        count = _Counter(phase, (num_steps + 1) * len(result_names(config)), progress)
        return PlainProbe(config, modules, dtype, len(prompt) + num_steps, count)

    values, output = _exact_values(plain("float64", "float64"), prompt, num_steps)
    # What transformers makes of quantized weights depends on other packages; ours, dequantized, are what is stored.
    name = None if modules.is_quantized else find_original(config.architecture)
    samples = samples_of(config, modules)
    reference = Reference(config, list(prompt), output, name, None, values, {}, samples)
    if name is not None:
        progress(name, 0, 0)
        theirs = _original_values(reference, model_dir)
        difference = _difference(reference, theirs, plain("float64", f"against {name}"), modules.arrays)
        reference = dataclasses.replace(reference, difference=difference)
    own = {
        dtype: Passes(
            _isolated_errors(reference, plain(dtype, f"{dtype}, each operation"), dtype),
            chained_errors(reference, plain(dtype, f"{dtype}, end to end")),
        )
        for dtype in dtypes
    }
    return dataclasses.replace(reference, own=own)


class _Counter:
    """Report the number of operations done."""

    def __init__(self, phase: str, total: int, progress: Progress):
        self._phase, self._done, self._total, self._progress = phase, 0, total, progress

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._phase, min(self._done, self._total), self._total)


def _check_prompt(config: ModelConfig, prompt: Sequence[int], num_steps: int) -> None:
    wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
    if not prompt or wrong:
        what = f"{wrong[0]} is not" if wrong else "there is none"
        raise QwenModelError(f"the prompt must have tokens from 0 to {config.vocab_size - 1}: {what}")
    if num_steps < 0:
        raise QwenModelError(f"--until-step must be 0 or more, not {num_steps}")
    length, longest = len(prompt) + num_steps, config.full_attention_length
    if 0 < longest < length:
        raise QwenModelError(
            f"beyond {longest} tokens the model attends through a window, which is not supported: {length} are too many"
        )


def _exact_values(probe: PlainProbe, prompt: Sequence[int], num_steps: int) -> tuple[list[dict[str, Array]], list[int]]:
    """Return the results of each step, and the tokens of the decode steps."""
    values, output = [probe.run(prompt, 0)], []
    for _ in range(num_steps):
        output.append(int(np.argmax(values[-1]["lm_head"][-1])))
        values.append(probe.run(output[-1:], len(prompt) + len(output) - 1))
    return values, output


def _original_values(reference: Reference, model_dir: Path) -> list[dict[str, Array]]:
    """Return the original's results of each step; its weights are freed at the end."""
    original = OriginalNetwork(model_dir, reference.model)
    return [original.run(tokens, past) for tokens, past in reference.steps]


def _difference(
    reference: Reference,
    theirs: list[dict[str, Array]],
    probe: PlainProbe,
    arrays: ReadArrays,
) -> Finding | None:
    """Compute each of our operations on what the original's read, and find the first that gives another result."""
    for step, (tokens, past) in enumerate(reference.steps):
        ours = probe.run(tokens, past, theirs[step])
        own = {name: _tolerated(name, past + len(tokens)) for name in ours}
        for name in result_names(reference.model):
            if name not in theirs[step]:  # q, k and v of a network with attention of its own kind
                continue
            error = error_of(theirs[step][name], ours[name])
            ratio = error.ratio(own[name], "float64")
            if ratio > LIMIT:
                # Inputs are the original's; the result beside which it is described is ours.
                values = [*theirs[:step], {**theirs[step], name: ours[name]}]
                case = dataclasses.replace(reference, values=values).case(name, step, arrays)
                return Finding(name, step, error, ratio, likely_reason([case], theirs[step], own, "float64"))
    return None


def _tolerated(name: str, positions: int) -> Error:
    """Return a `LIMIT`-th of the error that the original's result may have."""
    tolerance = NORM_TOLERANCE
    if kind_of(name) in ("attention.q", "attention.k", "attention"):
        tolerance += ANGLE_TOLERANCE * positions
    if kind_of(name) == "attention":
        tolerance *= ATTENTION_FACTOR
    return Error(tolerance / LIMIT, tolerance / LIMIT)


def _isolated_errors(reference: Reference, probe: PlainProbe, dtype: str) -> list[StepErrors]:
    """Measure each operation on exact inputs, and take care that no error is small by chance.

    The error of attention in a decode step comes of a few scores: the largest over several roundings of its inputs is
    taken. A sum in float32, which is not rounded to fewer bits, has an error that depends on its order: that of linear
    layers is at least what adding one product after the other makes of n products of random signs, sqrt(n) / 4
    roundings.
    """
    steps = isolated_errors(reference, probe)
    if dtype == "float32":
        for step, errors in enumerate(steps):
            for name in errors:
                if kind_of(name) in LINEAR_INPUTS:
                    _, x = reference.case(name, step, probe.module).linear_input
                    sums = ROUNDING[dtype] * x.shape[-1] ** 0.5 / 4
                    errors[name] = errors[name].largest(Error(sums, sums))
    for seed in range(ATTENTION_DRAWS):
        noise = np.random.default_rng(seed)
        for errors, (tokens, past), exact in zip(steps, reference.steps, reference.values, strict=True):
            for name, result in probe.run_attention(tokens, past, exact, noise).items():
                errors[name] = errors[name].largest(error_of(result, exact[name]))
    return steps
