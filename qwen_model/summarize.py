"""Judge an engine by its summaries of articles, beside the original: the command `qwen-model summarize`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import (
    add_engine_arguments,
    add_verbose_argument,
    check_output_file,
    non_negative_integer,
    number_above_zero,
    open_engine,
    positive_integer,
    progress_line,
    run_command,
)
from .common.errors import QwenModelError
from .common.files import write_whole
from .common.log import show_log

if TYPE_CHECKING:
    from .evaluation.articles import Article
    from .evaluation.summaries import Summaries

DEFAULT_PROMPTS, DEFAULT_NEW_TOKENS, LARGEST_DEFAULT_BATCH = 20, 100, 8


def main(arguments: list[str] | None = None) -> None:
    """Print a table of ROUGE, time and tokens; exit with status 1 if an accuracy that is to be checked is off."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    show_log(options.verbose)
    if options.check_accuracy and options.hf is None:
        parser.error("--check-accuracy compares with the original: give --hf")
    check_output_file(options.output)
    settings, found, articles = _summarize(options)

    from .evaluation.summaries import ROUGE, losses, table

    print(f"{settings['engine']}, {settings['dtype']}: {settings['description']}\n")
    print(table(found))
    if options.output is not None:
        _write(options.output, settings, found, articles)
    if options.check_accuracy:
        off = {name: lost for name, lost in losses(*found).items() if lost > options.rouge_threshold}
        for name, lost in off.items():
            print(f"{ROUGE[name]} is {lost:.2f} lower than the original's", file=sys.stderr)
        if off:
            raise SystemExit(1)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    description = "Judge an engine by its summaries of articles, beside the original."
    parser = argparse.ArgumentParser(prog="qwen-model summarize", description=description)
    add_engine_arguments(parser)
    parser.add_argument("--hf", metavar="MODEL", help="also run this checkpoint in transformers: a folder or a name")
    parser.add_argument(
        "--dataset",
        metavar="FILE|NAME",
        help="articles: a JSON or JSON Lines file with article and highlights, or a data set of the Hugging Face hub "
        "such as abisee/cnn_dailymail (default: 12 short articles of this package)",
    )
    parser.add_argument(
        "--num-prompts", type=positive_integer, metavar="N", help=f"articles (default: {DEFAULT_PROMPTS}, or all)"
    )
    parser.add_argument(
        "--seed", type=non_negative_integer, default=0, metavar="N", help="of the articles that are drawn (default: 0)"
    )
    parser.add_argument("--num-beams", type=positive_integer, default=1, metavar="N", help="beam search with N beams")
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        metavar="N",
        help="articles at a time (default: 8, or the engine's limit)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        metavar="N",
        help="of a summary (default: 100, or the engine's limit)",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask through the chat template (default); --no-chat, for base models: continue after TL;DR:",
    )
    parser.add_argument(
        "--check-accuracy", action="store_true", help="exit with status 1 if a ROUGE is lower than the original's"
    )
    parser.add_argument(
        "--rouge-threshold",
        type=number_above_zero,
        default=1.0,
        metavar="X",
        help="by how much it may be lower, in percent points (default: 1)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the scores and all summaries")
    add_verbose_argument(parser)
    return parser


def _summarize(options: argparse.Namespace) -> tuple[dict[str, Any], list[Summaries], list[Article]]:
    """Run the engine, then the original if it is asked for; return the settings, both results and the articles."""
    from .evaluation.articles import summary_prompt
    from .evaluation.original import Original, check_loadable
    from .evaluation.summaries import check_rouge, engine_generate, original_generate, summarize

    check_rouge()
    if options.hf is not None:
        check_loadable(options.hf)
    articles = _articles(options)
    session = open_engine(options)
    config, tokenizer = session.config, session.tokenizer
    if tokenizer is None:
        raise QwenModelError("summaries need a tokenizer, and this engine has none")
    limits = config.limits
    new_tokens = options.max_new_tokens or min(DEFAULT_NEW_TOKENS, limits.max_output_len)
    batch_size = options.batch_size or max(1, min(LARGEST_DEFAULT_BATCH, limits.max_batch_size // options.num_beams))
    ends = {*config.end_token_ids, *(tokenizer.chat_end_token_ids() if options.chat else ())}
    end_token_ids = sorted(token for token in ends if token < config.model.vocab_size)
    made = [summary_prompt(article.text, tokenizer, limits.max_input_len, options.chat) for article in articles]
    prompts = [prompt for prompt, _ in made]
    cut = sum(was_cut for _, was_cut in made)
    if cut:
        print(f"note: {cut} articles cut to the engine's limit of {limits.max_input_len} tokens", file=sys.stderr)

    how = (new_tokens, options.num_beams, end_token_ids)
    load = (prompts, articles, tokenizer, batch_size, end_token_ids)
    name = f"{config.backend} engine"
    found = [summarize(name, engine_generate(session, *how), *load, progress_line(name))]
    del session
    if options.hf is not None:
        original = Original(options.hf, config.dtype, options.device)
        found.append(summarize(original.name, original_generate(original, *how), *load, progress_line(original.name)))
    beams = f", {options.num_beams} beams" if options.num_beams > 1 else ""
    settings = {
        "engine": str(options.engine_dir),
        "dtype": config.dtype,
        "description": f"{len(articles)} articles in batches of {batch_size}, at most {new_tokens} new tokens{beams}",
        "seed": options.seed,
        "articles_cut": cut,
        "versions": config.versions,
    }
    return settings, found, articles


def _articles(options: argparse.Namespace) -> list[Article]:
    from .evaluation.articles import choose, load_articles

    articles, malformed = load_articles(options.dataset)
    if malformed:
        print(f"note: {malformed} entries without an article or a summary left out", file=sys.stderr)
    if options.num_prompts is not None and options.num_prompts > len(articles):
        print(f"note: there are {len(articles)} articles, not {options.num_prompts}: all are taken", file=sys.stderr)
    return choose(articles, options.num_prompts or DEFAULT_PROMPTS, options.seed)


def _write(path: Path, settings: dict[str, Any], found: list[Summaries], articles: list[Article]) -> None:
    values = {
        **settings,
        "references": [article.summary for article in articles],
        "results": [dataclasses.asdict(summaries) for summaries in found],
    }
    write_whole(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    run_command(main)
