"""How well a model predicts a text. What quantization costs shows here first.

    qwen-model perplexity --engine-dir ENGINE [--text-file FILE]

Without a text it is the packaged model's held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .command_line import add_engine_arguments, run_command
from .common.errors import QwenModelError
from .engine.session import Session
from .packaged_model import held_out_text

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of one text.

    per_token: exp of the mean of -log p over the predicted tokens; models of one tokenizer can be compared by it.
    bits_per_byte: the same in bits, over the text's UTF-8 bytes; any models can be compared by it.
    tokens: how many tokens were predicted.
    bytes: of the text, special tokens not counted.
    window: tokens that see one another; each window starts anew.
    """

    per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int


def next_token_nats(
    logits: Callable[[Sequence[int]], npt.NDArray[np.floating]],
    token_ids: Sequence[int],
    window: int = DEFAULT_WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """The sum of -log p(token | tokens before it in its window), in nats, over all ``token_ids`` but the first.

    Args:
        logits: gives the logits [tokens, vocab_size] after each of at most ``window`` tokens.
        token_ids: the text.
        window: the last token of a window is the first of the next, so that each is predicted once.
        progress: called with the tokens predicted and their total.
    """
    nats, total = 0.0, len(token_ids) - 1
    for start in range(0, total, window):
        inputs, targets = token_ids[start : start + window], token_ids[start + 1 : start + window + 1]
        scores = np.asarray(logits(inputs[: len(targets)]), dtype=np.float32)
        scores = scores - scores.max(axis=-1, keepdims=True)  # a new array: the old one is not ours
        log_sums = np.log(np.exp(scores).sum(axis=-1, dtype=np.float64))
        nats += float((log_sums - scores[np.arange(len(targets)), targets]).sum())
        if progress is not None:
            progress(start + len(targets), total)
    return nats


def measure_perplexity(
    session: Session,
    text: str | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of an engine.

    Args:
        session: a loaded engine that has a tokenizer.
        text: None: the packaged model's held-out text.
        window: tokens that see one another. None: 1024, or the engine's ``max_input_len`` if that is lower.
        progress: called with the tokens predicted and their total.

    Raises:
        QwenModelError: the engine has no tokenizer, the text is too short, or the window longer than its limit.
    """
    if session.tokenizer is None:
        raise QwenModelError("measuring a perplexity needs a tokenizer, and this engine has none")
    limit = session.config.limits.max_input_len
    window = min(DEFAULT_WINDOW, limit) if window is None else window
    if not 1 <= window <= limit:
        raise QwenModelError(f"the window must be 1 to {limit} tokens, the engine's max_input_len, not {window}")
    token_ids = session.tokenizer.encode(held_out_text() if text is None else text)
    num_bytes = len(session.tokenizer.decode(token_ids).encode())
    if len(token_ids) < 2 or num_bytes == 0:
        raise QwenModelError(f"a perplexity needs a text of at least 2 tokens, this one has {len(token_ids)}")
    nats = next_token_nats(session.logits, token_ids, window, progress)
    predicted = len(token_ids) - 1
    return Perplexity(math.exp(nats / predicted), nats / math.log(2) / num_bytes, predicted, num_bytes, window)


def main(arguments: list[str] | None = None) -> None:
    """Print the perplexity of an engine."""
    options = make_parser().parse_args(arguments)
    text = None if options.text_file is None else _read_text(options.text_file)

    from .engine import load_engine

    session = load_engine(options.engine_dir, device=options.device)
    started = time.perf_counter()
    result = measure_perplexity(session, text, options.window, _show_progress)
    if options.json:
        print(json.dumps(asdict(result)))
        return
    print(
        f"perplexity {result.per_token:.4f} per token, {result.bits_per_byte:.4f} bits per byte\n"
        f"over {result.tokens:,} tokens ({result.bytes:,} bytes) in windows of {result.window}, "
        f"{time.perf_counter() - started:.1f} s"
    )


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    description = "Measure how well an engine predicts a text."
    parser = argparse.ArgumentParser(prog="qwen-model perplexity", description=description)
    add_engine_arguments(parser)
    parser.add_argument("--text-file", type=Path, help="UTF-8 text (default: the packaged model's held-out text)")
    parser.add_argument("--window", type=int, help="tokens that see one another (default: 1024 or the engine's limit)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QwenModelError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} tokens", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
