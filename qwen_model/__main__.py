"""Run any of the commands: `qwen-model COMMAND`, or `python -m qwen_model COMMAND`."""

from __future__ import annotations

import argparse
import sys

import shtab

from . import (
    benchmark,
    build,
    chat,
    compare,
    doctor,
    evalscope,
    export,
    inspect,
    lm_eval,
    perplexity,
    quantize,
    run,
    serve,
    summarize,
)
from .command_line import run_command
from .common.version import package_version

COMMANDS = {
    "build": build,
    "run": run,
    "chat": chat,
    "serve": serve,
    "quantize": quantize,
    "export": export,
    "inspect": inspect,
    "compare": compare,
    "perplexity": perplexity,
    "summarize": summarize,
    "benchmark": benchmark,
    "lm_eval": lm_eval,
    "evalscope": evalscope,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the first argument names; print the version, the help or a shell's completion script."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        COMMANDS[given[0]].main(given[1:])
    else:
        _parser().parse_args(given or ["--help"])


def _parser() -> argparse.ArgumentParser:
    description = "Build engines of Qwen and its relatives from checkpoints, and generate with them."
    parser = argparse.ArgumentParser(prog="qwen-model", description=description)
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    shtab.add_argument_to(parser, "--print-completion", help="print the script that completes this command in a shell")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = module.make_parser()
        _complete_paths(command)
        commands.add_parser(name, parents=[command], add_help=False, help=command.description)
    return parser


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let shells complete paths for the arguments whose metavar says that they take a folder or a file."""
    for action in parser._actions:
        metavar = str(action.metavar)
        if metavar in ("DIR", "ENGINE"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif "FILE" in metavar:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def entry_point() -> None:
    """Run as the console script `qwen-model`."""
    run_command(main)


if __name__ == "__main__":
    entry_point()
