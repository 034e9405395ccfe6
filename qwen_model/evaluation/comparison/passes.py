"""Run a network beside a reference: each operation on exact inputs, or each on the results of those before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...interface.probe import Array, Probe
from .errors import error_of
from .reference import Reference, StepErrors


def isolated_errors(
    reference: Reference,
    probe: Probe,
    inspect: Callable[[int, Mapping[str, Array], StepErrors], None] = lambda step, found, errors: None,
) -> list[StepErrors]:
    """Give each operation exact inputs, and return the errors of each step; `inspect` sees the results of a step."""
    steps = []
    for step, ((tokens, past), exact) in enumerate(zip(reference.steps, reference.values, strict=True)):
        found = probe.run(tokens, past, exact)
        steps.append(_errors(found, exact))
        inspect(step, found, steps[-1])
    return steps


def chained_errors(reference: Reference, probe: Probe) -> list[StepErrors]:
    """Give each operation what those before it computed, and return the errors of each step."""
    return [
        _errors(probe.run(tokens, past), exact)
        for (tokens, past), exact in zip(reference.steps, reference.values, strict=True)
    ]


def _errors(found: Mapping[str, Array], exact: Mapping[str, Array]) -> StepErrors:
    return {name: error_of(value, exact[name]) for name, value in found.items()}
