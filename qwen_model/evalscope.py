"""Evaluate an engine with EvalScope: the command `qwen-model evalscope`."""

from __future__ import annotations

import argparse

from .command_line import add_engine_arguments, run_command
from .common.extras import import_extra


def main(arguments: list[str] | None = None) -> None:
    """Run `evalscope eval` on an engine; options that are not ours are EvalScope's."""
    options, others = make_parser().parse_known_args(arguments)
    arguments_of_evalscope = import_extra("evalscope.arguments", "the command evalscope", "evalscope")

    from evalscope.run import run_task

    from .evaluation import evalscope_model  # noqa: F401 (registers the model API)

    theirs = argparse.ArgumentParser(prog="qwen-model evalscope", allow_abbrev=False)
    arguments_of_evalscope.add_argument(theirs)
    task = theirs.parse_args(others)
    # Not on EvalScope's command line, which knows its own kinds of models only.
    task.eval_type, task.model = "qwen_model", str(options.engine_dir)
    task.model_args = {**(task.model_args or {}), **({} if options.device is None else {"device": options.device})}
    run_task(task)


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
