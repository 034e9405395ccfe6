"""Draw what `benchmarks.tensorrt_rms_norm` and `benchmarks.tensorrt_timeline` recorded.

    python -m benchmarks.plot_tensorrt

Needs matplotlib (``pip install "qwen-plugins[benchmarks]"``), and neither a GPU nor TensorRT.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import IMAGES, RESULTS, pyplot, save_figure

COLORS = {"native": "#9aa5b1", "plugin": "#76b900"}
NAMES = {"native": "native layers", "plugin": "plug-in"}
SHOWN_OPERATIONS = 4  # of the chain, in the timeline


def draw_times(content: dict[str, Any], path: Path) -> None:
    """Draw bars of native layers and plug-in by number of tokens, one panel per operation, for chains."""
    plt = pyplot()
    results = [result for result in content["results"] if result["layers"] > 1]
    operations = list(dict.fromkeys(result["operation"] for result in results))
    figure, panels = plt.subplots(1, len(operations), figsize=(4 * len(operations), 3.6), squeeze=False)
    for panel, operation in zip(panels[0], operations, strict=True):
        for side, implementation in ((-0.2, "native"), (0.2, "plugin")):
            chosen = [r for r in results if (r["operation"], r["implementation"]) == (operation, implementation)]
            bars = panel.bar(
                [i + side for i in range(len(chosen))],
                [r["microseconds"] for r in chosen],
                width=0.38,
                color=COLORS[implementation],
                label=NAMES[implementation],
            )
            panel.bar_label(bars, fmt="%.3g", fontsize=8)
            panel.set_xticks(range(len(chosen)), [str(r["tokens"]) for r in chosen])
        panel.set(yscale="log", title=operation, xlabel="tokens")
        panel.margins(y=0.15)
    panels[0][0].set_ylabel("µs per operation")
    panels[0][0].legend(frameon=False)
    machine = content["machine"]
    title = (
        f"RMSNorm in a TensorRT {machine['tensorrt']} engine, chain of 32, float16, hidden size "
        f"{content['hidden_size']}, {machine['gpu']}"
    )
    save_figure(figure, title, path)
    plt.close(figure)


def draw_timeline(content: dict[str, Any], path: Path) -> None:
    """Draw each kernel as a bar from start to end, for as long as the native layers' first operations take."""
    plt = pyplot()
    recordings = content["recordings"]
    tokens = list(dict.fromkeys(recording["tokens"] for recording in recordings))
    figure, panels = plt.subplots(len(tokens), 1, figsize=(11, 2.1 * len(tokens)), squeeze=False)
    for panel, count in zip(panels[:, 0], tokens, strict=True):
        chosen = {r["implementation"]: r["kernels"] for r in recordings if r["tokens"] == count}
        shown_until = chosen["native"][-1]["end"] * SHOWN_OPERATIONS / content["layers"] / 1000
        for row, implementation in enumerate(("plugin", "native")):
            kernels = chosen[implementation]
            spans = [(k["start"] / 1000, (k["end"] - k["start"]) / 1000) for k in kernels]
            panel.broken_barh(
                spans, (row - 0.35, 0.7), facecolor=COLORS[implementation], edgecolor="white", linewidth=0.6
            )
        labels = [f"{NAMES[i]}\n{len(chosen[i]) / content['layers']:.3g} kernels each" for i in ("plugin", "native")]
        panel.set_yticks([0, 1], labels)
        panel.set(xlim=(0, shown_until), title=f"{count} token{'s' if count > 1 else ''}", xlabel="µs")
    machine = content["machine"]
    title = (
        f"Kernels of a chain of RMSNorms in a TensorRT {machine['tensorrt']} engine, as long as the native layers take "
        f"for {SHOWN_OPERATIONS} ({machine['gpu']}, CUPTI)"
    )
    save_figure(figure, title, path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the TensorRT benchmarks.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    drawings = {"tensorrt_rms_norm": draw_times, "tensorrt_timeline": draw_timeline}
    for name, draw in drawings.items():
        draw(json.loads((arguments.results / f"{name}.json").read_text()), arguments.pictures / f"{name}.svg")


if __name__ == "__main__":
    main()
