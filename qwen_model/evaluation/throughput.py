"""Make the rows of a benchmark from its records: rates and percentiles, as a Markdown table and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import OutOfMemoryError
from ..common.extras import import_extra
from ..common.files import write_whole
from .load import BatchTarget, Progress, Record, RequestTarget, run_batches, run_requests
from .markdown import markdown_table
from .workload import Request

LONGEST_NOTE = 160  # characters


@dataclass(frozen=True)
class Percentiles:
    """Hold nearest-rank percentiles: each is a value that was measured; p99 of fewer than 100 values is the largest."""

    p50: float
    p90: float
    p99: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """Return the percentiles; None if there are no values."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (ordered[math.ceil(percent / 100 * len(ordered)) - 1] for percent in (50, 90, 99))
        return cls(p50, p90, p99, len(ordered))


@dataclass(frozen=True)
class Rates:
    """Hold what is counted per second of the whole run; total tokens are those of prompts and generated ones."""

    seconds: float
    requests: float
    generated_tokens: float
    total_tokens: float


@dataclass(frozen=True)
class Row:
    """Hold the results of one implementation at one batch size, or of a server at one concurrency.

    concurrency: the batch size, or the most requests under way; None: no limit.
    requests, failed: how many requests succeeded and failed.
    rates, first_token_ms, per_token_ms, between_tokens_ms: of the requests that succeeded; None where there are none.
    note: why there are no results, or why requests failed; else empty.
    """

    implementation: str
    concurrency: int | None
    requests: int = 0
    failed: int = 0
    rates: Rates | None = None
    first_token_ms: Percentiles | None = None
    per_token_ms: Percentiles | None = None
    between_tokens_ms: Percentiles | None = None
    note: str = ""


def row(implementation: str, concurrency: int | None, records: Sequence[Record], seconds: float) -> Row:
    """Sum up the records of one run."""
    good = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    note = ""
    if errors:
        commonest = max(errors, key=errors.count)
        note = _short(f"{len(errors)} of {len(records)} requests failed: {commonest}")
    if not good:
        return Row(implementation, concurrency, failed=len(errors), note=note)
    generated = sum(record.generated_tokens for record in good)
    total = generated + sum(record.prompt_tokens for record in good)
    per_token = [record.seconds_per_token for record in good]
    return Row(
        implementation,
        concurrency,
        len(good),
        len(errors),
        Rates(seconds, len(good) / seconds, generated / seconds, total / seconds),
        _milliseconds([record.first_token_seconds for record in good]),
        _milliseconds([value for value in per_token if value is not None]),
        _milliseconds([gap for record in good for gap in record.gaps]),
        note,
    )


def _milliseconds(seconds: Sequence[float]) -> Percentiles | None:
    return Percentiles.of([1e3 * value for value in seconds])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_NOTE else line[: LONGEST_NOTE - 3] + "..."


def measure_batches(
    implementation: str,
    target: BatchTarget,
    requests: Sequence[Request],
    batch_sizes: Sequence[int],
    progress: Callable[[str], Progress | None],
    largest_batch: int | None = None,
) -> list[Row]:
    """Measure each batch size, the smallest first; where memory does not suffice, a row says so and is the last.

    largest_batch: what the implementation takes at most. None: no limit is known.
    progress: called with a heading; returns the callback for a run.
    """
    rows: list[Row] = []
    for size in sorted(set(batch_sizes)):
        note = ""
        if len(requests) < size:
            note = f"there are only {len(requests)} prompts: give a larger --num-prompts"
        elif largest_batch is not None and size > largest_batch:
            note = f"more than the engine's limit of {largest_batch}: build it with a larger --max-batch-size"
        if note:
            rows.append(Row(implementation, size, note=note))
            continue
        try:
            records, seconds = run_batches(target, requests, size, progress(f"{implementation}, batch {size}"))
        except (OutOfMemoryError, MemoryError) as error:
            return [*rows, out_of_memory(implementation, size, error)]
        rows.append(row(implementation, size, records, seconds))
    return rows


def out_of_memory(implementation: str, concurrency: int | None, error: Exception) -> Row:
    """Return the row that says that memory did not suffice."""
    return Row(implementation, concurrency, note=_short(f"out of memory: {error}".removesuffix(": ")))


def measure_server(
    implementation: str,
    target: RequestTarget,
    loads: Sequence[tuple[int | None, Sequence[Request]]],
    request_rate: float | None,
    seed: int,
    progress: Callable[[str], Progress | None],
) -> list[Row]:
    """Measure a server at each concurrency with the requests beside it, after one request that is not measured."""
    rows = []
    target.send(Request(loads[0][1][0].prompt[::-1], 1))  # no prompt that follows: it would be in a prefix cache
    for concurrency, requests in loads:
        heading = implementation + ("" if concurrency is None else f", {concurrency} at a time")
        records, seconds = run_requests(target, requests, concurrency, request_rate, seed, progress(heading))
        rows.append(row(implementation, concurrency, records, seconds))
    return rows


def shares(requests: Sequence[Request], count: int, size: int) -> list[Sequence[Request]]:
    """Return `count` lists of `size` requests, all different if there are enough; else each list has all requests."""
    if len(requests) < count * size:
        return [requests] * count
    return [requests[place * size : (place + 1) * size] for place in range(count)]


def markdown(rows: Sequence[Row], concurrency_name: str = "batch") -> str:
    """Return a Markdown table of the rows; it has a column for notes if there are any."""
    heads = [
        "implementation",
        concurrency_name,
        "requests/s",
        "generated tokens/s",
        "all tokens/s",
        "first token, ms, p50 / p90 / p99",
        "per token, ms",
        "between tokens, ms",
    ]
    notes = any(row.note for row in rows)
    cells = [[*_cells(row), row.note] if notes else _cells(row) for row in rows]
    return markdown_table([*heads, "note"] if notes else heads, cells)


def _cells(row: Row) -> list[str]:
    rates = row.rates
    counts = (None,) * 3 if rates is None else (rates.requests, rates.generated_tokens, rates.total_tokens)
    return [
        row.implementation,
        "-" if row.concurrency is None else str(row.concurrency),
        *("-" if count is None else _number(count) for count in counts),
        *(
            "-" if found is None else " / ".join(map(_number, (found.p50, found.p90, found.p99)))
            for found in (row.first_token_ms, row.per_token_ms, row.between_tokens_ms)
        ),
    ]


def _number(value: float) -> str:
    """Return a number with three digits, or all digits before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value >= 0.001 else f"{value:.1g}"


def draw(rows: Sequence[Row], title: str, path: Path, concurrency_name: str = "batch size") -> None:
    """Draw tokens per second, and p50 to p99 of both latencies, over the batch sizes.

    Raises:
        QwenModelError: matplotlib is not installed.
    """
    matplotlib = import_extra("matplotlib", "a plot", "benchmarks")
    matplotlib.use("Agg")
    plt = import_extra("matplotlib.pyplot", "a plot", "benchmarks")
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5))
    for name in dict.fromkeys(row.implementation for row in rows):
        here = [row for row in rows if row.implementation == name and row.rates and row.concurrency]
        sizes = [row.concurrency for row in here]
        panels[0].plot(sizes, [row.rates.generated_tokens for row in here if row.rates], "o-", label=name)
        for panel, pick in ((panels[1], lambda row: row.first_token_ms), (panels[2], lambda row: row.per_token_ms)):
            found = [(row.concurrency, pick(row)) for row in here if pick(row) is not None]
            (line,) = panel.plot([size for size, _ in found], [times.p50 for _, times in found], "o-", label=name)
            panel.fill_between(
                [size for size, _ in found],
                [times.p50 for _, times in found],
                [times.p99 for _, times in found],
                color=line.get_color(),
                alpha=0.2,
            )
    for panel, heading in zip(
        panels, ("generated tokens/s", "first token, ms (p50 to p99)", "per token, ms (p50 to p99)"), strict=True
    ):
        panel.set(title=heading, xlabel=concurrency_name, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".") or "svg")
    plt.close(figure)
    write_whole(path, picture.getvalue())
