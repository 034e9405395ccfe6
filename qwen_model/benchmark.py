"""Measure how fast an engine generates, beside transformers, or a server: the command `qwen-model benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import (
    add_engine_arguments,
    add_verbose_argument,
    check_output_file,
    given_option,
    non_negative_integer,
    number_above_zero,
    open_engine,
    positive_integer,
    progress_line,
    run_command,
)
from .common.errors import OutOfMemoryError, QwenModelError
from .common.files import write_whole
from .common.log import show_log

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .evaluation.throughput import Row
    from .evaluation.workload import Workload
    from .interface.engine_config import Limits

DEFAULT_LENGTHS = (128, 128)
DEFAULT_PROMPTS = 16
ENGINE_OPTIONS = ("device", "tuning", "gpu_memory_utilization", "deterministic")
SERVER_OPTIONS = ("endpoint", "model", "tokenizer", "request_rate", "max_concurrency", "timeout", "ignore_eos")


def main(arguments: list[str] | None = None) -> None:
    """Print a Markdown table; write JSON and a plot if they are asked for."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    show_log(options.verbose)
    _check(parser, options)
    if options.url is None and (name := given_option(make_parser, SERVER_OPTIONS, arguments)):
        parser.error(f"{name} is for a server: it needs --url")
    if options.url is not None and (name := given_option(make_parser, ENGINE_OPTIONS, arguments)):
        parser.error(f"{name} is an engine's, and --url a server's")
    for path in (options.output, options.plot):
        check_output_file(path)
    heading, rows = (_benchmark_server if options.url else _benchmark_engine)(options)
    _report(options, heading, rows)
    if all(row.rates is None for row in rows):
        raise SystemExit(1)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    description = "Measure how fast an engine generates, beside transformers, or a server."
    parser = argparse.ArgumentParser(prog="qwen-model benchmark", description=description)
    add_engine_arguments(parser)
    parser.add_argument(
        "--hf",
        metavar="MODEL",
        help="also measure this checkpoint in transformers: a folder, or a name of the hub",
    )
    _add_load_arguments(parser.add_argument_group("load"))
    _add_server_arguments(parser.add_argument_group("server", "A server is measured in place of an engine."))
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE.json", help="write the load and all rows")
    output.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the rows (.svg, .png or .pdf)")
    add_verbose_argument(parser)
    return parser


def _add_load_arguments(load: argparse._ArgumentGroup) -> None:
    load.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help="prompts and lengths of conversations in ShareGPT's format",
    )
    load.add_argument(
        "--random",
        type=_two_lengths,
        metavar="IN,OUT",
        help="random prompts of IN tokens, and OUT new tokens for each (default: 128,128, or the engine's limits)",
    )
    load.add_argument(
        "--num-prompts",
        type=positive_integer,
        metavar="N",
        help="requests of each row (default: 16, or the largest batch)",
    )
    load.add_argument(
        "--seed", type=non_negative_integer, default=0, metavar="N", help="of the prompts that are drawn (default: 0)"
    )
    load.add_argument(
        "--batch-sizes",
        type=positive_integer,
        nargs="+",
        metavar="N",
        help="a row for each (default: 1, 2, 4, ... up to the engine's limit); of a server: requests at a time",
    )


def _add_server_arguments(server: argparse._ArgumentGroup) -> None:
    server.add_argument("--url", metavar="URL", help="address of a server with OpenAI's API, such as http://host:8000")
    server.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="chat: the prompt is the user's message",
    )
    server.add_argument("--model", metavar="NAME", help="the server's model (default: its first)")
    server.add_argument("--tokenizer", type=Path, metavar="DIR", help="engine or checkpoint with its tokenizer")
    server.add_argument(
        "--request-rate",
        type=number_above_zero,
        metavar="R",
        help="requests a second (default: all at once)",
    )
    server.add_argument(
        "--max-concurrency",
        type=positive_integer,
        metavar="N",
        help="one row, with at most N requests at a time",
    )
    server.add_argument(
        "--timeout",
        type=number_above_zero,
        default=600.0,
        metavar="S",
        help="seconds without an event after which a request fails (default: 600)",
    )
    server.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="send ignore_eos (default: yes)"
    )


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.dataset is not None and options.random is not None:
        parser.error("give --dataset or --random, not both")
    if options.url is not None and options.hf is not None:
        parser.error("--hf is measured beside an engine, not beside a server")
    if options.batch_sizes is not None and (options.request_rate is not None or options.max_concurrency is not None):
        parser.error("--batch-sizes makes a row for each number; --request-rate and --max-concurrency make one row")
    if options.plot is not None and options.plot.suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot takes a name that ends in .svg, .png or .pdf, not {options.plot}")


def _two_lengths(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected two numbers of tokens, such as 128,128, not {text!r}")
    return positive_integer(parts[0].strip()), positive_integer(parts[1].strip())


def _benchmark_engine(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    from .evaluation.targets import EngineTarget
    from .evaluation.throughput import measure_batches

    if options.hf is not None:
        from .evaluation.original import check_loadable

        check_loadable(options.hf)
    session = open_engine(options)
    config = session.config
    limit = config.limits.max_batch_size
    sizes = options.batch_sizes or sorted({*(1 << power for power in range(limit.bit_length())), limit})
    special = session.tokenizer.special_tokens.values() if session.tokenizer else ()
    count = options.num_prompts or max(DEFAULT_PROMPTS, *sizes)
    workload = _workload(options, session.tokenizer, config.limits, config.model.vocab_size, special, count)
    name = f"{config.backend} engine"
    rows = measure_batches(name, EngineTarget(session), workload.requests, sizes, progress_line, limit)
    heading = {
        "engine": str(options.engine_dir),
        "architecture": config.model.architecture,
        "parameters": config.num_parameters,
        "dtype": config.dtype,
        "quantization": sorted({each.text for each in config.weight_formats.values()}),
        "device": _device_name(options.device),
        "versions": config.versions,
        "load": workload.description,
    }
    del session
    if options.hf is not None:
        rows += _measure_original(options, config.dtype, workload, sizes)
    return heading, rows


def _measure_original(options: argparse.Namespace, dtype: str, workload: Workload, sizes: list[int]) -> list[Row]:
    from .evaluation.original import Original
    from .evaluation.targets import OriginalTarget
    from .evaluation.throughput import measure_batches, out_of_memory

    try:
        original = Original(options.hf, dtype, options.device)
    except OutOfMemoryError as error:
        return [out_of_memory("transformers", min(sizes), error)]
    return measure_batches(original.name, OriginalTarget(original), workload.requests, sizes, progress_line)


def _benchmark_server(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    from .checkpoints.tokenizer import load_tokenizer
    from .evaluation.server import Server
    from .evaluation.throughput import measure_server, shares
    from .interface.engine_config import EngineConfig, Limits, read_engine_json

    folder = options.tokenizer or Path(options.engine_dir)
    tokenizer = load_tokenizer(folder)
    limits = EngineConfig.read(folder).limits if read_engine_json(folder) is not None else Limits()
    server = Server(options.url, tokenizer, options.endpoint, options.model, options.ignore_eos, options.timeout)
    one_row = options.max_concurrency is not None or options.request_rate is not None
    concurrencies = [options.max_concurrency] if one_row else sorted(set(options.batch_sizes or [1, 2, 4, 8]))
    count = options.num_prompts or max(DEFAULT_PROMPTS, *(value or 0 for value in concurrencies))
    special = tokenizer.special_tokens.values()
    # Each row has prompts of its own: a server may keep those of the row before in a prefix cache.
    workload = _workload(options, tokenizer, limits, tokenizer.vocab_size, special, len(concurrencies) * count)
    each = shares(workload.requests, len(concurrencies), count)
    if len(concurrencies) > 1 and each[0] is each[1]:
        _note("every row has the same prompts, since there are too few: a prefix cache makes later rows faster")
    loads = list(zip(concurrencies, each, strict=True))
    rows = measure_server(server.model, server, loads, options.request_rate, options.seed, progress_line)
    rate = "all at once" if options.request_rate is None else f"{options.request_rate:g} requests/s"
    load = f"{len(each[0])} requests in each row, {rate}, of {workload.description}"
    return {"url": options.url, "model": server.model, "load": load}, rows


def _workload(
    options: argparse.Namespace,
    tokenizer: Tokenizer | None,
    limits: Limits,
    vocab_size: int,
    special: Any,
    count: int,
) -> Workload:
    from .evaluation.workload import random_workload, share_gpt_workload

    if options.dataset is None:
        default = (min(DEFAULT_LENGTHS[0], limits.max_input_len), min(DEFAULT_LENGTHS[1], limits.max_output_len))
        prompt_tokens, new_tokens = options.random or default
        if options.url is None and (prompt_tokens > limits.max_input_len or new_tokens > limits.max_output_len):
            raise QwenModelError(
                f"--random {prompt_tokens},{new_tokens} is beyond the engine's limits, prompts of "
                f"{limits.max_input_len} tokens and outputs of {limits.max_output_len}"
            )
        return random_workload(vocab_size, prompt_tokens, new_tokens, count, options.seed, special)
    if tokenizer is None:
        raise QwenModelError("--dataset needs a tokenizer, and this engine has none: give --random")
    found = share_gpt_workload(options.dataset, tokenizer, limits, count, options.seed)
    if len(found.requests) < count and options.num_prompts is not None:
        _note(f"{options.dataset} has {len(found.requests)} usable conversations, not {count}: all are taken")
    for reason, skipped in found.skipped.items():
        _note(f"{skipped} entries of {options.dataset} were left out: {reason}")
    return found


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _device_name(device: str | None) -> str:
    torch = sys.modules.get("torch")
    if torch is None:
        return "GPU"
    if device != "cpu" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _what_was_measured(heading: dict[str, Any]) -> str:
    if "engine" not in heading:
        return str(heading["url"])
    formats = " and ".join(heading["quantization"])
    quantized = [f"weights in {formats}"] if formats else []
    return ", ".join([heading["engine"], heading["dtype"], *quantized, heading["device"]])


def _report(options: argparse.Namespace, heading: dict[str, Any], rows: list[Row]) -> None:
    from .evaluation.throughput import draw, markdown

    what = _what_was_measured(heading)
    print(f"{what}: {heading['load']}\n")
    print(markdown(rows, "at a time" if options.url else "batch"))
    if options.output is not None:
        values = {**heading, "platform": platform.platform(), "rows": [dataclasses.asdict(row) for row in rows]}
        write_whole(options.output, (json.dumps(values, indent=2) + "\n").encode())
    if options.plot is not None:
        try:
            draw(rows, f"{what}\n{heading['load']}", options.plot, "at a time" if options.url else "batch size")
        except QwenModelError as error:
            _note(f"no plot: {error}")


if __name__ == "__main__":
    run_command(main)
