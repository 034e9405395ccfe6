"""Find which operation of which layer of an engine is wrong: the command `qwen-model compare`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoints.config import DTYPES, ModelConfig
from .command_line import (
    DEFAULT_ENGINE_DIR,
    add_verbose_argument,
    check_output_file,
    parse_token_ids,
    progress_bar,
    run_command,
)
from .common.errors import QwenModelError
from .common.extras import import_extra
from .common.files import write_whole
from .common.log import show_log
from .interface.engine_config import EngineConfig
from .packaged_model import packaged_model_dir

if TYPE_CHECKING:
    from .common.progress import Progress
    from .evaluation.comparison.reference import Reference

DEFAULT_PROMPT_LENGTH = 24


def main(arguments: list[str] | None = None) -> None:
    """Compare, and exit with 1 if an operation is off; or write a file of reference values. Wrong use exits with 2."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    show_log(options.verbose)
    if options.save_reference is not None and (options.reference is not None or options.engine_dir is not None):
        parser.error("--save-reference takes neither --reference nor --engine-dir: it needs no engine")
    if options.save_reference is not None and (options.output is not None or options.picture is not None):
        parser.error("--save-reference takes neither --output nor --picture: it compares nothing")
    if options.prompt is not None and options.input_ids is not None:
        parser.error("give PROMPT or --input-ids, not both")
    try:
        passed = _run(options)
    except QwenModelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not passed:
        sys.stdout.flush()
        sys.exit(1)


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    description = (
        "Compare each operation of an engine with the original network, name the first that is off, and say why. "
        "Exit status: 0 if none is, 1 if one is, 2 for wrong use."
    )
    parser = argparse.ArgumentParser(prog="qwen-model compare", description=description)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text (default: tokens from the whole vocabulary)")
    parser.add_argument("--input-ids", metavar="1,2,3", help="token ids in place of PROMPT")
    parser.add_argument("--until-step", type=int, metavar="N", help="compare N decode steps, too (default: 0)")
    parser.add_argument(
        "--model-dir",
        type=Path,
        metavar="DIR",
        help="the engine's checkpoint (default: the model in this package, or with --reference none)",
    )
    parser.add_argument("--engine-dir", type=Path, metavar="ENGINE", help=f"engine (default: {DEFAULT_ENGINE_DIR})")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument(
        "--save-reference", type=Path, metavar="FILE", help="write the reference values to a file, and compare nothing"
    )
    parser.add_argument("--reference", type=Path, metavar="FILE", help="read the reference values from such a file")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all errors as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the errors over the layers")
    add_verbose_argument(parser)
    return parser


def _run(options: argparse.Namespace) -> bool:
    """Do what was asked; return whether nothing is off."""
    for path in (options.save_reference, options.output, options.picture):
        check_output_file(path)
    if options.picture is not None:
        from .evaluation.comparison.picture import check_picture

        check_picture(options.picture)
    with progress_bar(unit="") as progress:
        reference = _reference(options, progress)
        if options.save_reference is not None:
            from .evaluation.comparison.reference_file import write_reference
            from .evaluation.comparison.report import difference_lines

            write_reference(options.save_reference, reference)
            print("\n".join(difference_lines(reference)) or f"wrote {options.save_reference}")
            return reference.difference is None
        return _compare(options, reference, progress)


def _reference(options: argparse.Namespace, progress: Progress) -> Reference:
    """Read the reference, or make it: for the engine's type, or for all types if it is to be saved."""
    from .evaluation.comparison import compare, reference_file

    if options.reference is not None:
        reference = reference_file.read_reference(options.reference)
        compare.check_prompt(reference, _prompt(options), options.until_step)
        return reference
    model_dir = options.model_dir or packaged_model_dir()
    model = ModelConfig.from_model_dir(model_dir)
    given = _prompt(options)
    prompt = default_prompt(model.vocab_size) if given is None else given
    steps, dtypes = options.until_step or 0, list(DTYPES)
    if options.save_reference is None:
        engine = EngineConfig.read(_engine_dir(options))
        compare.check_engine(engine, model, len(prompt), steps)
        compare.check_quantization(engine, model_dir)
        dtypes = [engine.dtype]
    import_extra("torch", "making reference values", extra="torch")
    from .evaluation.comparison.make_reference import make_reference

    return make_reference(model_dir, prompt, steps, dtypes, progress)


def _compare(options: argparse.Namespace, reference: Reference, progress: Progress) -> bool:
    """Print the comparison, write the files that are asked for, and return whether nothing is off."""
    from .evaluation.comparison.compare import compare_engine
    from .evaluation.comparison.report import as_json, text

    model_dir = options.model_dir
    if model_dir is None and options.reference is None:
        model_dir = packaged_model_dir()
    found = compare_engine(_engine_dir(options), reference, model_dir, options.device, progress)
    print(text(found))
    if options.output is not None:
        _write(options.output, json.dumps(as_json(found), indent=1).encode())
    if options.picture is not None:
        from .evaluation.comparison.picture import draw

        _write(options.picture, draw(found, options.picture.suffix))
    return found.passed


def _engine_dir(options: argparse.Namespace) -> Path:
    return options.engine_dir or Path(DEFAULT_ENGINE_DIR)


def _prompt(options: argparse.Namespace) -> list[int] | None:
    """Return the tokens that the user gave, if any; the checkpoint, or else the engine, has the tokenizer."""
    if options.input_ids is not None:
        return parse_token_ids(options.input_ids)
    if options.prompt is None:
        return None
    from .checkpoints.tokenizer import load_tokenizer

    folder = packaged_model_dir() if options.reference is None else _engine_dir(options)
    return load_tokenizer(options.model_dir or folder).encode(options.prompt)


def default_prompt(vocab_size: int) -> list[int]:
    """Return tokens from the whole vocabulary, so that every model has a prompt, with or without a tokenizer."""
    return [index * vocab_size // DEFAULT_PROMPT_LENGTH for index in range(DEFAULT_PROMPT_LENGTH)]


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise QwenModelError(f"{path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run_command(main)
