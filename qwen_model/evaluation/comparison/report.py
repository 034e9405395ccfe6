"""Show a comparison as a table of layers and operations, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .compare import Comparison
from .errors import LIMIT
from .reference import Finding, Passes, Reference, layer_end

COLUMNS = {
    "norm": ("input_norm", "input_norm.residual"),
    "qkv": ("attention.qkv",),
    "q": ("attention.q",),
    "k": ("attention.k",),
    "v": ("attention.v",),
    "attention": ("attention",),
    "output": ("attention.output",),
    "norm 2": ("post_attention_norm", "post_attention_norm.residual"),
    "gate-up": ("mlp.gate_up",),
    "down": ("mlp.down",),
}
"""The columns of the table, and the results that each shows the worst of."""


def text(found: Comparison) -> str:
    """Format the comparison: what was compared, a table for the prompt and one for the decode steps, the verdict."""
    config, reference = found.config, found.reference
    original = (
        reference.original or "nothing: weights are quantized, or transformers, or this network in it, is missing"
    )
    lines = [
        f"engine     {found.engine_dir}: {config.backend}, {config.dtype}, {config.model.architecture}",
        f"reference  this package's network in float64, checked against {original}",
        f"tokens     {len(reference.prompt)} of prompt, {len(reference.output)} decode steps",
        "",
        "The error of each operation on exact inputs, over PyTorch's own in this type (- : not visible);",
        "then the error end to end, of the sum of all that the layers so far have added, and PyTorch's.",
    ]
    for title, steps in _phases(found):
        lines += ["", f"{title}", *_table(found, steps)]
    return "\n".join([*lines, "", *_verdict(found)])


def _phases(found: Comparison) -> list[tuple[str, range]]:
    count = len(found.passes.isolated)
    phases = [("prompt", range(1))]
    if count > 1:
        phases.append((f"decode, the worst of {count - 1} step{'s' * (count > 2)}", range(1, count)))
    return phases


def _table(found: Comparison, steps: Sequence[int]) -> list[str]:
    rows = [["", *COLUMNS, "end to end", "PyTorch"]]
    rows.append(_outside_row(found, steps, "embedding"))
    for layer in range(found.config.model.num_layers):
        names = [[f"layers.{layer}.{kind}" for kind in kinds] for kinds in COLUMNS.values()]
        cells = [_ratio_cell(found, results, steps) for results in names]
        rows.append([f"layer {layer}", *cells, *_ends(found, layer_end(found.config.model, layer), steps)])
    rows += [_outside_row(found, steps, name) for name in ("final_norm", "lm_head")]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _outside_row(found: Comparison, steps: Sequence[int], name: str) -> list[str]:
    """Return the row of an operation outside of the layers, whose ratio is in the first column."""
    title = {"final_norm": "final norm", "lm_head": "logits"}.get(name, name)
    names = [name, f"{name}.residual"]
    return [title, _ratio_cell(found, names, steps), *[""] * (len(COLUMNS) - 1), *_ends(found, name, steps)]


def ratio(found: Comparison, name: str, steps: Sequence[int]) -> float | None:
    """Return the largest ratio of one result in some steps; None: the back end does not show the result."""
    pairs = [(found.passes.isolated[step], found.own.isolated[step]) for step in steps]
    ratios = [errors[name].ratio(own[name], found.config.dtype) for errors, own in pairs if name in errors]
    return max(ratios, default=None)


def _ratio_cell(found: Comparison, names: Sequence[str], steps: Sequence[int]) -> str:
    ratios = [value for name in names if (value := ratio(found, name, steps)) is not None]
    if not ratios:
        return "-"
    worst = max(ratios)
    mark = " !" if worst > LIMIT else ""
    return ("inf" if math.isinf(worst) else f"{worst:.1f}" if worst < 1000 else f"{worst:.0e}") + mark


def _ends(found: Comparison, name: str, steps: Sequence[int]) -> list[str]:
    return [f"{end_error(passes, name, steps):.1e}" for passes in (found.passes, found.own)]


def end_error(passes: Passes, name: str, steps: Sequence[int]) -> float:
    """Return the largest relative error of a result end to end in some steps."""
    return max(passes.chained[step][name].rms for step in steps)


def _verdict(found: Comparison) -> list[str]:
    lines = difference_lines(found.reference)
    if found.finding is not None:
        lines.append(f"off: {_place(found.finding)}, {_times(found.finding)}: {found.finding.reason}.")
    if found.logits_ratio > LIMIT and found.finding is None:
        lines.append(
            f"off: the engine's own logits, {_number(found.logits_ratio)} times the error of its operations one after "
            "the other: it was built of another checkpoint, or with other options."
        )
    return lines or [f"No operation is off: none has more than {LIMIT:g} times the error of PyTorch's own."]


def difference_lines(reference: Reference) -> list[str]:
    """Say in a line where the original and our network differ, if they do."""
    if reference.difference is None:
        return []
    return [
        f"off: {_place(reference.difference)}, where {reference.original} and this package's reading of the checkpoint "
        f"differ. The original's result beside ours: {reference.difference.reason}. See docs/adding_an_architecture.md."
    ]


def _place(finding: Finding) -> str:
    return f"{finding.name} in {'the prompt' if finding.step == 0 else f'decode step {finding.step}'}"


def _times(finding: Finding) -> str:
    return f"{_number(finding.ratio)} times the error of PyTorch's own"


def _number(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:,.0f}"


def as_json(found: Comparison) -> dict[str, Any]:
    """Return everything but the values as what JSON can hold; numbers that are not finite are null."""
    reference = found.reference
    return {
        "passed": found.passed,
        "engine_dir": found.engine_dir,
        "engine": dataclasses.asdict(found.config),
        "original": reference.original,
        "prompt": reference.prompt,
        "output": reference.output,
        "difference": _plain(reference.difference),
        "finding": _plain(found.finding),
        "logits": _plain(found.logits),
        "limit": LIMIT,
        "errors": {"engine": _plain(found.passes), "pytorch": _plain(found.own)},
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
