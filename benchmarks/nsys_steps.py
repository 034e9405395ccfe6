"""Run a prompt and decode steps of an engine, for Nsight Systems to record.

    nsys profile --trace=cuda,nvtx --cuda-graph-trace=node -o NAME python -m benchmarks.nsys_steps --engine-dir ENGINE

A prompt, then decode steps, each of them one replay of a CUDA graph; all of it once before, to warm up. TensorRT marks
each layer that it launches with an NVTX range, and each plug-in its own launches; the torch back end's prompt and steps
are in ranges of those names. `benchmarks.nsys_report` reads the recording. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.generate import Load
from qwen_model import QwenModelError, load_engine
from qwen_model.engine.scheduler import Scheduler
from qwen_model.engine.sequences import Sequence

Ranges = Callable[[str], AbstractContextManager[Any]]

PROMPT, DECODE_STEP = "prompt", "decode step"


def run(scheduler: Scheduler, prompts: list[list[int]], steps: int, marked: Ranges) -> None:
    """Run the prompts, then `steps` decode steps; `marked` opens an NVTX range."""
    for prompt in prompts:
        scheduler.add(Sequence(prompt, steps + 1))
    decoding = False
    while scheduler.has_work:
        with marked(DECODE_STEP if decoding else PROMPT):
            decoding = len(scheduler.step()) == len(prompts) or decoding


def ranges(backend: str) -> Ranges:
    """Return what opens an NVTX range: PyTorch's, where PyTorch is in use."""
    if backend != "torch":
        return nullcontext
    import torch

    opened: Ranges = torch.cuda.nvtx.range
    return opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-dir", required=True, metavar="DIR")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="decode steps (default: %(default)s)")
    options = parser.parse_args()
    try:
        session = load_engine(options.engine_dir, device="cuda")
    except QwenModelError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    prompts = Load(options.sequences, options.prompt_tokens, 1).prompts(session.config.model.vocab_size, seed=0)
    session.device.runs_ahead = False  # so that a range holds the step that it is named after
    run(session.scheduler, prompts, 1, nullcontext)
    run(session.scheduler, [prompt[::-1] for prompt in prompts], options.steps, ranges(session.config.backend))


if __name__ == "__main__":
    main()
