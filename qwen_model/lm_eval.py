"""Evaluate an engine with lm-eval: the command `qwen-model lm_eval`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .command_line import add_engine_arguments, run_command
from .common.errors import QwenModelError
from .common.extras import import_extra

TASKS = Path(__file__).parent / "evaluation" / "lm_eval_tasks"


def main(arguments: list[str] | None = None) -> None:
    """Run lm-eval on an engine; options that are not ours are lm-eval's."""
    options, others = make_parser().parse_known_args(arguments)
    harness = import_extra("lm_eval.__main__", "the command lm_eval", "lm-eval")

    from .evaluation import lm_eval_model  # noqa: F401 (registers the model class)

    device = [] if options.device is None else ["--device", options.device]
    sys.argv = ["lm-eval", *_arguments(options.engine_dir, others), *device]
    try:
        harness.cli_evaluate()
    except QwenModelError:
        raise
    except ValueError as error:  # so it says that there is no such task, for example
        raise QwenModelError(f"lm-eval: {' '.join(str(error).split())}") from error


def _arguments(engine_dir: str, others: list[str]) -> list[str]:
    """Return lm-eval's arguments, with batches and tasks of our own where the user names none."""
    batch = [] if {"--batch_size", "-b"} & set(others) else ["--batch_size", "auto"]
    tasks = [] if "--include_path" in others else ["--include_path", str(TASKS)]
    model = json.dumps({"engine_dir": engine_dir})  # as KEY=VALUE, a comma or a number would be something else
    return ["run", "--model", "qwen_model", "--model_args", model, *batch, *tasks, *others]


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model lm_eval",
        description="Evaluate an engine with lm-eval.",
        epilog="All other options are those of `lm_eval run`, such as --tasks, --limit, --num_fewshot, --include_path, "
        "--apply_chat_template and --output_path. --tasks packaged_python needs no download. Prompts are batched up to "
        "the engine's limit unless --batch_size is given.",
        allow_abbrev=False,
    )
    add_engine_arguments(parser, tuning=False)
    return parser


if __name__ == "__main__":
    run_command(main)
