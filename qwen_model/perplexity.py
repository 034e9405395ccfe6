"""Measure how well an engine predicts a text: the command `qwen-model perplexity`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .command_line import (
    add_engine_arguments,
    add_verbose_argument,
    given_option,
    open_engine,
    positive_integer,
    run_command,
)
from .common.errors import QwenModelError
from .common.files import read_text
from .common.log import show_log
from .evaluation.divergence import DEFAULT_TOKENS, Prediction, compare_predictions
from .evaluation.perplexity import Perplexity, measure_perplexity, next_token_nats
from .interface.engine_config import EngineConfig

if TYPE_CHECKING:
    from .engine.session import Session

__all__ = ["Perplexity", "main", "measure_perplexity", "next_token_nats"]


def main(arguments: list[str] | None = None) -> None:
    """Print the perplexity of an engine, or compare several."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    text = None if options.text_file is None else read_text(options.text_file)
    if options.compare is not None:
        if given_option(make_parser, ["engine_dir"], arguments):
            raise QwenModelError(
                f"--compare takes the place of --engine-dir: name {options.engine_dir} there, as the first"
            )
        _compare(options, text)
        return
    if options.tokens is not None:
        raise QwenModelError("--tokens is for --compare: without it all of the text is predicted")

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


def _compare(options: argparse.Namespace, text: str | None) -> None:
    def load(engine: str) -> Session:
        return open_engine(argparse.Namespace(**{**vars(options), "engine_dir": engine}))

    if len(options.compare) < 2:
        raise QwenModelError(f"--compare takes two engines or more, given {options.compare[0]} alone")
    for engine in options.compare:
        EngineConfig.read(Path(engine))  # a mistyped folder is an error before hours of work
    tokens = DEFAULT_TOKENS if options.tokens is None else options.tokens
    found: list[Prediction] = []
    predictions = compare_predictions(options.compare, load, text, options.window, tokens, progress=_show_progress)
    for prediction in predictions:
        found.append(prediction)
        if not options.json:
            print(_line(prediction, found[0], max(map(len, options.compare))), flush=True)
    if options.json:
        print(json.dumps([asdict(prediction) for prediction in found]))
        return
    print(
        f"over {found[0].tokens:,} tokens; the divergence is that of the next token from the first engine's, in "
        "thousandths of a nat"
    )


def _line(prediction: Prediction, first: Prediction, width: int) -> str:
    line = f"{prediction.engine:{width}}  perplexity {prediction.perplexity:9.4f}"
    if prediction is first:
        return line
    change = prediction.perplexity / first.perplexity - 1
    return (
        f"{line} ({change:+.2%}), divergence {1000 * prediction.mean_divergence:.3f}, at most "
        f"{1000 * prediction.largest_divergence:,.1f}, same token {prediction.same_token:.2%}"
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
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="ENGINE",
        help="measure these engines in place of --engine-dir, and how far the next token's distribution of each is "
        "from the first's (Kullback-Leibler divergence); one is loaded at a time",
    )
    parser.add_argument(
        "--tokens",
        type=positive_integer,
        metavar="N",
        help=f"with --compare, the tokens that are predicted (default: {DEFAULT_TOKENS}); a temporary file has 4 bytes "
        "for each and each token of the vocabulary",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_verbose_argument(parser)
    return parser


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} tokens", end="" if done < total else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
