"""Measure how well an engine predicts a text: the command `qwen-model perplexity`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .command_line import add_engine_arguments, add_verbose_argument, open_engine, run_command
from .common.files import read_text
from .common.log import show_log
from .evaluation.perplexity import Perplexity, measure_perplexity, next_token_nats

__all__ = ["Perplexity", "main", "measure_perplexity", "next_token_nats"]


def main(arguments: list[str] | None = None) -> None:
    """Print the perplexity of an engine."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    text = None if options.text_file is None else read_text(options.text_file)

    session = open_engine(options)
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
    parser.add_argument(
        "--text-file", type=Path, metavar="FILE", help="UTF-8 text (default: the packaged model's held-out text)"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens that see one another (default: 1024 or the engine's limit)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_verbose_argument(parser)
    return parser


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} tokens", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
