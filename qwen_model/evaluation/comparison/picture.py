"""Draw a comparison over the layers with matplotlib."""

from __future__ import annotations

import io
from pathlib import Path

from ...common.errors import QwenModelError
from ...common.extras import import_extra
from .compare import Comparison
from .errors import LIMIT
from .reference import layer_end
from .report import COLUMNS, end_error, ratio

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raise QwenModelError if matplotlib is missing, or draws no files of that name."""
    import_extra("matplotlib", "--picture", extra="benchmarks")
    if path.suffix not in FORMATS:
        raise QwenModelError(f"--picture draws {', '.join(FORMATS)}: give such a name, not {path}")


def draw(found: Comparison, suffix: str) -> bytes:
    """Draw the ratio of each operation, and below it the errors end to end, as a file of one of `FORMATS`."""
    figures = import_extra("matplotlib.figure", "--picture", extra="benchmarks")
    figure = figures.Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = range(len(found.passes.isolated))
    layers = range(found.config.model.num_layers)
    for title, kinds in COLUMNS.items():
        ratios = [ratio(found, f"layers.{layer}.{kinds[0]}", steps) for layer in layers]
        if None not in ratios:
            above.plot(layers, ratios, marker=".", label=title)
    above.axhline(LIMIT, color="black", linestyle="--", linewidth=1)
    above.set(yscale="log", ylabel="error over PyTorch's own", title="each operation on exact inputs")
    above.legend(ncols=5, fontsize="small")
    for label, passes in (("engine", found.passes), ("PyTorch", found.own)):
        errors = [end_error(passes, layer_end(found.config.model, layer), steps) for layer in layers]
        below.plot(layers, errors, marker=".", label=label)
    below.set(yscale="log", xlabel="layer", ylabel="relative error", title=f"end to end, {found.config.dtype}")
    below.legend()
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:], dpi=120)
    return content.getvalue()
