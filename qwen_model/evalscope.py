"""Evaluate an engine with EvalScope: the command `qwen-model evalscope`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_line import add_engine_arguments, run_command
from .common.errors import QwenModelError
from .common.extras import import_extra
from .interface.engine_config import EngineConfig


def main(arguments: list[str] | None = None) -> None:
    """Run `evalscope eval` on an engine; options that are not ours are EvalScope's."""
    options, others = make_parser().parse_known_args(arguments)
    EngineConfig.read(Path(options.engine_dir))  # EvalScope would load it after it has read the data sets
    arguments_of_evalscope = import_extra("evalscope.arguments", "the command evalscope", "evalscope")

    from evalscope.run import run_task

    from .evaluation import evalscope_model  # noqa: F401 (registers the model API)

    theirs = argparse.ArgumentParser(prog="qwen-model evalscope", allow_abbrev=False)
    arguments_of_evalscope.add_argument(theirs)
    task = theirs.parse_args(others)
    if not task.datasets:
        theirs.error("the following arguments are required: --datasets")
    # Not on EvalScope's command line, which knows its own kinds of models only.
    task.eval_type, task.model = "qwen_model", str(options.engine_dir)
    task.model_args = {**(task.model_args or {}), **({} if options.device is None else {"device": options.device})}
    try:
        run_task(task)
    except QwenModelError:
        raise
    except ValueError as error:  # so it says that there is no such data set, for example
        raise QwenModelError(f"EvalScope: {' '.join(str(error).split())}") from error


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model evalscope",
        description="Evaluate an engine with EvalScope.",
        epilog="All other options are those of `evalscope eval`, such as --datasets, --dataset-args, --limit and "
        "--generation-config.",
        allow_abbrev=False,
    )
    add_engine_arguments(parser, tuning=False)
    return parser


if __name__ == "__main__":
    run_command(main)
