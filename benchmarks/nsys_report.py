"""Read what Nsight Systems recorded of `benchmarks.nsys_steps`: times of each kind of layer, and pictures of them.

    nsys export --type sqlite --output NAME.sqlite NAME.nsys-rep
    python -m benchmarks.nsys_report NAME.sqlite ...    # a recording is called what its file is called
    python -m benchmarks.nsys_report --draw             # draws what was read before; needs matplotlib

Recordings called plugins, native_norms and native_rotary, of TensorRT engines with all plug-ins and without RMSNorm or
the rotary embedding, are drawn beside what was published for the first engines of Qwen-7B. Reading needs no GPU.

A kernel belongs to the innermost NVTX range in which it was launched, or in which its node of a CUDA graph was
captured. The time of a layer is that from the end of the kernel before it to the end of its last kernel. nsys ends a
kernel where the next one begins; with programmatic dependent launch that begins early, and the time in which it waits
for the one before it counts as its own. So the step as a whole is exact, and what a kernel has of it only nearly.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sqlite3
import statistics
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.common import IMAGES, RESULTS, commit, pyplot, save_figure, short
from benchmarks.decode_timeline import COLORS, Kernel, attribute, short_name
from qwen_model.common.files import write_whole

PHASES = ("prompt", "decode step")
LAYER_KINDS = {"norms": r"[Nn]orm", "attention": r"\.attention(?!\.)|GptAttention|rotary|\[(Concatenation|Slice)\]"}
"""Patterns of the names of NVTX ranges: of TensorRT's layers, of plug-ins. layers.0.attention.qkv is a linear layer."""
RANGE_TYPE = 59  # NvtxPushPopRange
CORE = {"norms": "", "attention": "atten"}
"""What the name of a layer's main kernel contains, beside kernels of the same kind that all layers share."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A Comparison is native layers beside a plug-in: the recordings to compare, and what was published."""

    title: str
    kind: str
    native: str
    labels: tuple[str, str]
    published: dict[str, tuple[float, float]]  # microseconds: native, plug-in
    phases: tuple[str, ...]  # that are drawn, the last one with its kernels


COMPARISONS = {
    "nsys_rms_norm": Comparison(
        "RMSNorm",
        "norms",
        "native_norms",
        ("native layers", "plug-in"),
        {"published, first": (22.0, 5.7), "published, second": (9.5, 4.2)},
        PHASES,
    ),
    "nsys_attention": Comparison(
        "Attention with rotary embedding",
        "attention",
        "native_rotary",
        ("rotary outside", "rotary inside"),
        {"published": (110.0, 17.0)},
        # In a decode step TensorRT's first kernel begins while the product before it runs, and has that one's time.
        ("prompt",),
    ),
}


@dataclasses.dataclass(frozen=True)
class LaunchedKernel(Kernel):
    """A LaunchedKernel knows the ranges that it was launched in, the innermost first, and its graph launch, if any."""

    ranges: tuple[str, ...] = ()
    graph: int | None = None

    @property
    def kind(self) -> str:
        """Return the kind that the innermost range with a known name says, else that of the kernel's name."""
        for name in self.ranges:
            for kind, pattern in LAYER_KINDS.items():
                if re.search(pattern, name):
                    return kind
        return super().kind


Range = tuple[int, int, str]  # start, end, name


def read_kernels(path: Path) -> list[LaunchedKernel]:
    """Return all kernels of a recording in the order of their starts."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        ranges = _ranges(database)
        captured = _captured(database)
        rows = database.execute(
            "SELECT k.start, k.end, s.value, k.correlationId, k.graphNodeId, r.start, r.globalTid "
            "FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName "
            "LEFT JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = k.correlationId "
            "AND (r.globalTid & ~0xFFFFFF) = k.globalPid ORDER BY k.start"
        )
        return [
            LaunchedKernel(
                name,
                start,
                end,
                _around(ranges, *captured.get(node, (launched, thread))),
                None if node is None else correlation,
            )
            for start, end, name, correlation, node, launched, thread in rows
        ]


def _ranges(database: sqlite3.Connection) -> dict[int, list[Range]]:
    """Return the NVTX ranges of each thread, in the order of their starts; there may be none."""
    found: dict[int, list[Range]] = {}
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'NVTX_EVENTS'").fetchone():
        rows = database.execute(
            "SELECT e.globalTid, e.start, e.end, coalesce(e.text, s.value) FROM NVTX_EVENTS e "
            f"LEFT JOIN StringIds s ON s.id = e.textId WHERE e.eventType = {RANGE_TYPE} AND e.end IS NOT NULL "
            "ORDER BY e.start, e.end DESC"
        )
        for thread, start, end, name in rows:
            found.setdefault(thread, []).append((start, end, name or ""))
    return found


def _captured(database: sqlite3.Connection) -> dict[int, tuple[int, int]]:
    """Return when, and on which thread, each node of an executable graph was captured."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'CUDA_GRAPH_NODE_EVENTS'").fetchone():
        return {}
    rows = database.execute(
        "SELECT clone.graphNodeId, node.start, node.globalTid FROM CUDA_GRAPH_NODE_EVENTS clone "
        "JOIN CUDA_GRAPH_NODE_EVENTS node ON node.graphNodeId = clone.originalGraphNodeId "
        "WHERE node.originalGraphNodeId IS NULL"
    )
    return {node: (start, thread) for node, start, thread in rows}


def _around(ranges: dict[int, list[Range]], moment: int | None, thread: int | None) -> tuple[str, ...]:
    """Return the names of the ranges around a moment of a thread, the innermost first."""
    if moment is None or thread is None:
        return ()
    return tuple(name for start, end, name in reversed(ranges.get(thread, [])) if start <= moment <= end)


def split_phases(kernels: list[LaunchedKernel]) -> dict[str, list[list[LaunchedKernel]]]:
    """Return the kernels of the last prompt, and those of each decode step after it, which is one launch of a graph."""
    runs = [list(run) for _, run in groupby(kernels, key=lambda kernel: kernel.graph)]
    last_eager = max((i for i, run in enumerate(runs[:-1]) if run[0].graph is None), default=None)
    if last_eager is None or all(kernel.graph is None for kernel in kernels):
        raise SystemExit("the recording has no CUDA graphs: record with --cuda-graph-trace=node")
    return {"prompt": [runs[last_eager]], "decode step": [run for run in runs[last_eager + 1 :] if run[0].graph]}


def layers(step: list[LaunchedKernel], kind: str) -> Iterator[tuple[list[LaunchedKernel], int]]:
    """Yield the kernels of each layer of a kind, and when the kernel before them ended."""
    ended = step[0].start
    for same, group in groupby(step, key=lambda kernel: kernel.kind == kind):
        run = list(group)
        if same and any(CORE[kind] in kernel.name for kernel in run):
            yield run, ended
        ended = max(ended, *(kernel.end for kernel in run))


def summary(steps: list[list[LaunchedKernel]]) -> dict[str, Any]:
    """Return the microseconds of a step and of each kind in it, and of each layer that is compared: medians."""
    spent = [attribute(list(step), max(kernel.end for kernel in step)) for step in steps]
    kinds = [kind for kind in COLORS if any(kind in each for each in spent)]
    found: dict[str, Any] = {
        "kernels": len(steps[0]),
        "microseconds": statistics.median(sum(each.values()) for each in spent),
        "microseconds_by_kind": {kind: statistics.median(each.get(kind, 0.0) for each in spent) for kind in kinds},
        "layers": {},
    }
    for kind in LAYER_KINDS:
        if every := [layer for step in steps for layer in layers(step, kind)]:
            found["layers"][kind] = layer_summary(every, len(every) // len(steps))
    return found


def layer_summary(every: list[tuple[list[LaunchedKernel], int]], count: int) -> dict[str, Any]:
    """Return the medians over layers of a kind, `count` in each step, and the kernels of one in the middle."""
    run, ended = every[len(every) // 2]
    return {
        "count": count,
        "kernels": statistics.median(len(run) for run, _ in every),
        "microseconds": statistics.median((run[-1].end - ended) / 1e3 for run, ended in every),
        "microseconds_of_kernels": statistics.median(sum(k.end - k.start for k in run) / 1e3 for run, _ in every),
        "timeline": [{"name": short_name(k.name), "start": k.start - ended, "end": k.end - ended} for k in run],
    }


def read_recording(path: Path) -> dict[str, Any]:
    """Return the summaries of a recording's phases, and the GPU's name."""
    if path.suffix != ".sqlite" or not path.is_file():
        raise SystemExit(f"{path} is no SQLite export of a recording: nsys export --type sqlite NAME.nsys-rep")
    phases = split_phases(read_kernels(path))
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
        (gpu,) = database.execute("SELECT name FROM TARGET_INFO_GPU ORDER BY id LIMIT 1").fetchone()
    return {"name": path.stem, "gpu": gpu, "phases": {name: summary(steps) for name, steps in phases.items()}}


def table(recordings: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a row for each phase of each recording, a column for each kind."""
    columns = [kind for kind in COLORS if any(kind in p["microseconds_by_kind"] for p in _phases(recordings))]
    lines = [f"| µs | all | kernels | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for recording in recordings:
        for name, phase in recording["phases"].items():
            cells = [short(phase["microseconds_by_kind"].get(kind)) for kind in columns]
            head = f"{recording['name']}, {name} | {phase['microseconds']:.0f} | {phase['kernels']}"
            lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_table(recordings: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the layers that are compared: kernels and time of one of them."""
    lines = ["| one layer | kernels | µs in the step | µs of its kernels |", "|---|---|---|---|"]
    for recording in recordings:
        for name, phase in recording["phases"].items():
            for kind, layer in phase["layers"].items():
                times = f"{short(layer['microseconds'])} | {short(layer['microseconds_of_kernels'])}"
                lines.append(f"| {recording['name']}, {name}, {kind} | {layer['kernels']:g} | {times} |")
    return "\n".join(lines)


def _phases(recordings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [phase for recording in recordings for phase in recording["phases"].values()]


def draw(comparison: Comparison, recordings: list[dict[str, Any]], path: Path) -> None:
    """Draw bars of native layers and plug-in, published and here, and when the kernels of a layer run in a step."""
    by_name = {recording["name"]: recording for recording in recordings}
    pair = (by_name[comparison.native], by_name["plugins"])
    found = {
        name: tuple(each["phases"][name]["layers"][comparison.kind] for each in pair) for name in comparison.phases
    }
    bars = {
        **comparison.published,
        **{f"here, {name}": tuple(layer["microseconds"] for layer in layers) for name, layers in found.items()},
    }
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), width_ratios=[1, 1.3])
    for side, label, color in ((0, comparison.labels[0], "#9aa5b1"), (1, comparison.labels[1], "#76b900")):
        places = [place + (side - 0.5) * 0.4 for place in range(len(bars))]
        drawn = left.bar(places, [times[side] for times in bars.values()], width=0.38, color=color, label=label)
        left.bar_label(drawn, fmt="%.3g", fontsize=8)
        for kernel in found[comparison.phases[-1]][side]["timeline"]:
            span = (kernel["start"] / 1e3, (kernel["end"] - kernel["start"]) / 1e3)
            right.broken_barh([span], (0.65 - side, 0.7), facecolor=color, edgecolor="white", linewidth=0.8)
    left.set_xticks(range(len(bars)), [name.replace(", ", ",\n") for name in bars], fontsize=8)
    left.set(ylabel="µs")
    left.margins(y=0.15)
    left.legend(frameon=False, fontsize=8)
    right.set_yticks([1, 0], comparison.labels)
    right.set(title=f"one layer's kernels in a {comparison.phases[-1]}", xlabel="µs", xlim=(0, None))
    right.title.set_fontsize(9)
    save_figure(
        figure, f"{comparison.title} in TensorRT engines, shape of Qwen-7B, float16, {pair[0]['gpu']}, nsys", path
    )
    plt.close(figure)


def pairs(recordings: list[dict[str, Any]]) -> dict[str, Comparison]:
    """Return the comparisons whose recordings are there, by the names of their pictures."""
    names = {recording["name"] for recording in recordings}
    return {picture: each for picture, each in COMPARISONS.items() if {"plugins", each.native} <= names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="*", type=Path, metavar="FILE.sqlite")
    parser.add_argument("--results", type=Path, default=RESULTS / "nsys.json")
    parser.add_argument("--pictures", type=Path, default=IMAGES, metavar="DIR")
    parser.add_argument("--commit", default=commit(), help="of the tree that was recorded (default: of this one)")
    parser.add_argument("--draw", action="store_true", help="draw what was read before")
    options = parser.parse_args()
    if bool(options.recordings) == options.draw:
        parser.error("give recordings, or --draw")
    if options.draw:
        recordings = json.loads(options.results.read_text(encoding="utf-8"))["results"]
        for picture, comparison in pairs(recordings).items():
            draw(comparison, recordings, options.pictures / f"{picture}.svg")
        return
    recordings = [read_recording(path) for path in options.recordings]
    content = {"machine": {"gpu": recordings[0]["gpu"]}, "commit": options.commit, "results": recordings}
    write_whole(options.results, json.dumps(content, indent=1).encode())
    print(f"{table(recordings)}\n\n{layer_table(recordings)}\n\nwritten: {options.results}")


if __name__ == "__main__":
    main()
