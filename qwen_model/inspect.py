"""Show what is in an engine, and where the time of a TensorRT engine goes: the command `qwen-model inspect`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from .command_line import DEFAULT_ENGINE_DIR, add_verbose_argument, run_command
from .common.errors import QwenModelError
from .common.files import is_file, write_whole
from .common.log import show_log


def main(arguments: list[str] | None = None) -> None:
    """Print tables or one JSON object; draw the time of each kind of layer on request."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    if options.engine is not None and options.engine_dir is not None:
        raise QwenModelError("give the engine once, as ENGINE or as --engine-dir DIR")

    given = options.engine if options.engine is not None else options.engine_dir
    engine_dir = DEFAULT_ENGINE_DIR if given is None else given
    if is_file(Path(engine_dir)):
        _inspect_plan(engine_dir, options)
        return

    from .evaluation.inspection import check_picture, inspect_engine, picture, text

    if options.picture is not None:
        check_picture(options.picture)
    found = inspect_engine(engine_dir, options.sequences, options.prompt_tokens, options.device)
    if options.picture is not None and not found.layers:
        raise QwenModelError("--picture draws the layers of a TensorRT engine; this is one of the torch back end")
    print(json.dumps(asdict(found), indent=1) if options.json else text(found, options.all))
    if options.picture is not None:
        try:
            write_whole(options.picture, picture(found).encode())
        except OSError as error:
            raise QwenModelError(f"{options.picture} cannot be written: {error.strerror}") from error


def _inspect_plan(path: str, options: argparse.Namespace) -> None:
    if options.picture is not None or options.prompt_tokens is not None or options.sequences != 1:
        raise QwenModelError(
            f"{path} is a plan, which is not run: --picture, --sequences and --prompt-tokens are for engine folders"
        )

    from .evaluation.plan_inspection import inspect_plan, text

    found = inspect_plan(Path(path), options.device)
    print(json.dumps(asdict(found), indent=1) if options.json else text(found, options.all))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    description = (
        "Show the GEMM kernels of an engine; of a TensorRT engine also the profiles, inputs, outputs and layers, and "
        "the time of each layer; of the file of any plan, all but kernels and time."
    )
    parser = argparse.ArgumentParser(prog="qwen-model inspect", description=description)
    parser.add_argument("engine", nargs="?", metavar="ENGINE", help="folder of an engine, or file of a plan")
    parser.add_argument("--engine-dir", metavar="DIR", help=f"the same (default: {DEFAULT_ENGINE_DIR})")
    parser.add_argument("--sequences", type=int, default=1, metavar="N", help="sequences to run (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of each prompt (default: up to 128)")
    parser.add_argument("--all", action="store_true", help="list every layer in order, not one line for each kind")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the time of each kind of layer")
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1, ... (default: the first GPU)")
    add_verbose_argument(parser)
    return parser


if __name__ == "__main__":
    run_command(main)
