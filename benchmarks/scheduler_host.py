"""Measure the host's time between two steps of the scheduler, on a device that does nothing.

    python -m benchmarks.scheduler_host           # records; needs no GPU
    python -m benchmarks.scheduler_host --draw    # draws what was recorded; needs matplotlib alone

"decode": all sequences decode, none ends. "come and go": each generates 128 to 384 tokens, and others wait for its
slot, so that steps of prompts are among the steps. Where a device runs ahead, this time is hidden behind its steps. It
is the processor's time of the thread.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common import IMAGES, RESULTS, finish_panel, pyplot, save_figure, write_results
from qwen_model.engine.scheduler import Scheduler
from qwen_model.engine.sequences import Sequence as Generated
from qwen_model.interface.device import Batch, Chosen, FloatArray, Int32Array, Start, TokenMask
from qwen_model.interface.engine_config import GemmKernels

NUM_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
STEPS = 200
PROMPT_TOKENS = 256
NEW_TOKENS = {"decode": (1000, 1000), "come and go": (128, 384)}  # least and most


class NullChoice:
    """Holds tokens that nobody computed."""

    def __init__(self, count: int):
        self._chosen = Chosen(np.full(count, 5, np.int64))

    def wait(self) -> Chosen:
        """See `PendingChoice`."""
        return self._chosen


class NullDevice:
    """Implements `Device` without computing anything."""

    max_tokens = 8192
    page_size = 64
    runs_ahead = True
    mixes = True
    gemm_kernels: GemmKernels | None = None

    def __init__(self, max_sequences: int):
        self.max_sequences = self.max_logit_rows = max_sequences
        self.num_pages = 1 + max_sequences * (2 + (PROMPT_TOKENS + 1000) // self.page_size)
        self._choosing = 0

    def prepare(self, num_sequences: int) -> None:
        """See `Device`."""

    def start(self, sequences: Sequence[Start]) -> None:
        """See `Device`."""

    def forward(self, batch: Batch) -> None:
        """See `Device`."""
        self._choosing = int(batch.chooses.sum())

    def choose(self, masks: Mapping[int, TokenMask] | None = None, num_best: int | None = None) -> NullChoice:
        """See `Device`."""
        return NullChoice(self._choosing)

    def logits(self, batch: Batch, rows: Int32Array) -> FloatArray:
        """See `Device`."""
        raise NotImplementedError

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See `Device`."""


def sequences(count: int, new_tokens: tuple[int, int]) -> Iterable[Generated]:
    """Return sequences of different prompts."""
    source = random.Random(0)
    for _ in range(count):
        prompt = [source.randrange(100_000) for _ in range(source.randint(1, PROMPT_TOKENS))]
        yield Generated(prompt, source.randint(*new_tokens), end_token_ids=frozenset({1, 2}))


def measure(num_sequences: int, load: str) -> dict[str, Any]:
    """Return the median and the mean of the microseconds of a step that has the device full."""
    scheduler = Scheduler(NullDevice(num_sequences))
    for sequence in sequences(num_sequences if load == "decode" else 4 * num_sequences + 20, NEW_TOKENS[load]):
        scheduler.add(sequence)
    for _ in range(2 * num_sequences * PROMPT_TOKENS // scheduler.chunk_tokens + 10):  # until the slots are taken
        scheduler.step()
    times = []
    for _ in range(STEPS):
        start = time.thread_time()
        scheduler.step()
        times.append(1e6 * (time.thread_time() - start))
    return {
        "load": load,
        "sequences": num_sequences,
        "median_microseconds": round(statistics.median(times), 1),
        "mean_microseconds": round(statistics.fmean(times), 1),
    }


def draw(recorded: list[dict[str, Any]]) -> None:
    """Draw the times over the number of sequences."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(7, 4.2))
    for load in NEW_TOKENS:
        rows = [row for row in recorded if row["load"] == load]
        counts = [row["sequences"] for row in rows]
        panel.plot(counts, [row["median_microseconds"] for row in rows], "o-", label=f"{load}, median")
        panel.plot(counts, [row["mean_microseconds"] for row in rows], ":", label=f"{load}, mean")
    panel.axhline(300, color="#888888", linewidth=0.8)
    panel.set_yscale("log")
    finish_panel(panel, "", "sequences", "µs")
    save_figure(figure, "The scheduler's time on the host for a step", IMAGES / "scheduler_host.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw what was recorded")
    options = parser.parse_args()
    path = RESULTS / "scheduler_host.json"
    if options.draw:
        draw(json.loads(path.read_text(encoding="utf-8"))["results"])
        return
    results = []
    for load in NEW_TOKENS:
        for count in NUM_SEQUENCES:
            results.append(measure(count, load))
            print(results[-1], flush=True)
    write_results(path, results)


if __name__ == "__main__":
    main()
