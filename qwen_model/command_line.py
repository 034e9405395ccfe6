"""Hold what the commands share: errors in one line, the progress bar, sampling and chat options, reading of texts."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .common.errors import QwenModelError
from .common.extras import import_extra
from .common.files import is_folder, read_text
from .common.log import VARIABLE, show_log
from .common.progress import GEMM_KERNELS, Progress

if TYPE_CHECKING:
    from .engine.session import Session
    from .interface.sampling import SamplingDefaults, SamplingOptions

REMOVAL_SECONDS = 5


def run_command(main: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0; 1 with one line on standard error for what a user can put right; 130 on Ctrl-C."""
    terminate = _Terminate()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack characters
    try:
        show_log()
        main(arguments)
        sys.stdout.flush()
    except (QwenModelError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except MemoryError as error:
        print(f"error: there is not enough memory on the host: {str(error) or 'an allocation failed'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads the output any more: there is nobody to tell
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        # If standard output's device is full, the interpreter would flush it again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


class _Terminate:
    """Raise at a signal, so that half-written files are removed; those of the next seconds do not interrupt that.

    One that comes later raises again: the exception may have been raised where Python drops it, as in a finalizer.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if now - self._last < REMOVAL_SECONDS:
            return
        self._last = now
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)


def add_verbose_argument(parser: argparse.ArgumentParser) -> None:
    """Add --verbose, which `show_log` takes."""
    parser.add_argument(
        "--verbose",
        action="store_true",
        help=f"say on standard error what is done and how long it takes; {VARIABLE}=debug says more",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --temperature and the other options of sampling."""
    group = parser.add_argument_group(
        "choice of tokens",
        "Options that are not given are as the checkpoint's generation_config.json says; temperature 0 is greedy. If "
        "that file does not sample, or with --generation-config none, tokens are chosen greedily unless temperature, "
        "top-k, top-p or min-p is given.",
    )
    group.add_argument("--temperature", type=float, metavar="T", help="divide the logits by T; 0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens; 0: from all")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens that together have P; 1: from all",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from the tokens with at least P times the probability of the likeliest; 0: from all",
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less; 1: none")
    group.add_argument(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="subtract X, from -2 to 2, from the logits of tokens that the output has",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="subtract X, from -2 to 2, for each time that the output has a token",
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens")
    group.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="auto (default): take options that are not given from the checkpoint's generation_config.json, as vLLM "
        "does; none: ignore that file, except for its end tokens",
    )


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_sampling_arguments` that the user gave.

    Raises:
        QwenModelError: one is out of its range.
    """
    from .interface.sampling import SamplingOptions

    names = [field.name for field in dataclasses.fields(SamplingOptions) if field.name != "logit_bias"]
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    SamplingOptions(**given)
    return given


def sampling_options(arguments: argparse.Namespace, defaults: SamplingDefaults | None) -> SamplingOptions:
    """Return the sampling options: what the user gave, and for the rest `defaults`, if they are given and wanted."""
    from .interface.sampling import SamplingOptions

    given = given_sampling(arguments)
    if defaults is None or arguments.generation_config == "none":
        return SamplingOptions(**given)
    return defaults.options(**given)


def add_chat_arguments(parser: argparse.ArgumentParser, sanitize: bool) -> None:
    """Add --system, --tools and the other options of chats; `sanitize`: the default of --sanitize-control-tokens."""
    group = parser.add_argument_group("chat template")
    group.add_argument("--system", metavar="TEXT", help="system message (default: the chat template's)")
    group.add_argument("--tools", metavar="FILE", help="file with a JSON list of the functions that the model may call")
    group.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="one of the model's templates by its name, or a Jinja file (default: the model's own)",
    )
    group.add_argument(
        "--chat-template-kwargs", metavar="JSON", help='variables of the template, such as {"enable_thinking": false}'
    )
    group.add_argument(
        "--sanitize-control-tokens",
        action=argparse.BooleanOptionalAction,
        default=sanitize,
        help=f"read <|im_end|> and the like in messages as ordinary text (default: {'yes' if sanitize else 'no'})",
    )


def chat_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_chat_arguments` except --system, as arguments of `Session.generate`."""
    kwargs, tools = arguments.chat_template_kwargs, arguments.tools
    return {
        "tools": None if tools is None else _parsed(read_text_file(tools), list, f"--tools {tools}"),
        "chat_template": None if arguments.chat_template is None else _template(arguments.chat_template),
        "chat_template_kwargs": None if kwargs is None else _parsed(kwargs, dict, "--chat-template-kwargs"),
        "sanitize_control_tokens": arguments.sanitize_control_tokens,
    }


def _parsed(text: str, kind: type, option: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise QwenModelError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, kind):
        expected = "list" if kind is list else "object"
        raise QwenModelError(f"{option} must be a JSON {expected}, not {type(value).__name__}")
    return value


def _template(name: str) -> str:
    """Return the text of a file; a template's name stays as it is, for the tokenizer to look up."""
    is_file = "{" not in name and ("/" in name or "." in name)
    return read_text_file(name) if is_file else name


def read_text_file(name: str) -> str:
    """Return the text of a UTF-8 file that a user named; `-` is standard input.

    Raises:
        QwenModelError: it cannot be read, or is not UTF-8.
    """
    if name != "-":
        return read_text(Path(name))
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise QwenModelError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error


def parse_token_ids(text: str, option: str = "--input-ids") -> list[int]:
    """Read token ids with commas or spaces between them; `option` is named in errors.

    Raises:
        QwenModelError: one is not an integer, or is missing between two commas.
    """
    parts = [part.split() for part in text.split(",")] if text.strip() else []
    words = [word for part in parts for word in part]
    if not all(parts) or not all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in words):
        raise QwenModelError(f"{option} takes integers with commas between them, not {text!r}")
    return [int(word) for word in words]


def positive_integer(text: str) -> int:
    """Convert an option's value; argparse shows the error with the usage."""
    return _integer(text, least=1, expected="a positive integer")


def non_negative_integer(text: str) -> int:
    """Convert an option's value; argparse shows the error with the usage."""
    return _integer(text, least=0, expected="an integer of at least 0")


def _integer(text: str, least: int, expected: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected {expected}, not {text!r}")
    return int(text)


def number_above_zero(text: str) -> float:
    """Convert an option's value; argparse shows the error with the usage. Beyond its limits, system calls fail."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1e-6 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"expected a number from 0.000001 to 1000000, not {text!r}")
    return value


def check_output_file(path: Path | None) -> None:
    """Raise QwenModelError if no file can be written there: found out before the work, not after it."""
    if path is None:
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if is_folder(target):
        raise QwenModelError(f"{path} cannot be written: it is a folder")
    if not is_folder(target.parent):
        raise QwenModelError(f"{path} cannot be written: there is no folder {target.parent}")
    there = target.exists()
    # What is not a regular file, such as /dev/null, is written to directly: see write_whole.
    if (there and not os.access(target, os.W_OK)) or (
        (not there or target.is_file()) and not os.access(target.parent, os.W_OK | os.X_OK)
    ):
        raise QwenModelError(f"{path} cannot be written: permission denied")


def progress_line(heading: str) -> Callable[[int, int], None] | None:
    """Return a function that shows how much is done, in one line on standard error; None if that is no terminal."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        line = f"{heading}: {done:,} of {total:,}" if done < total else ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    return show


def add_engine_arguments(parser: argparse.ArgumentParser, tuning: bool = True) -> None:
    """Add --engine-dir and --device, and the other options of `open_engine` for commands that call it."""
    parser.add_argument("--engine-dir", default=DEFAULT_ENGINE_DIR, metavar="DIR", help="engine (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    if tuning:
        add_tuning_argument(parser)
        parser.add_argument(
            "--gpu-memory-utilization",
            type=float,
            default=0.9,
            metavar="PART",
            help="the part of the GPU's memory that may be in use when the engine is loaded; the key-value cache gets "
            "what is left of it (default: %(default)s)",
        )
        parser.add_argument(
            "--deterministic",
            action="store_true",
            help="torch on a GPU: what a prompt gives is the same, to the bit, whatever is computed beside it; slower",
        )


def add_tuning_argument(parser: argparse.ArgumentParser) -> None:
    """Add --no-tuning."""
    parser.add_argument(
        "--tuning",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time the GEMM kernels once for each GPU and model, and use the fastest; --no-tuning: choose by rules",
    )


def given_option(
    make_parser: Callable[[], argparse.ArgumentParser], names: Collection[str], arguments: list[str] | None
) -> str | None:
    """Return the first of some options that the command line gives, such as --device; None: it gives none of them.

    A value tells nothing, which may be the default.
    """
    parser = make_parser()
    parser.set_defaults(**dict.fromkeys(names))
    given = parser.parse_args(arguments)
    name = next((name for name in names if getattr(given, name) is not None), None)
    return None if name is None else f"--{name.replace('_', '-')}"


def open_engine(options: argparse.Namespace) -> Session:
    """Load the engine that the options of `add_engine_arguments` name, with a progress bar on standard error."""
    from .engine import load_engine

    with progress_bar() as progress:
        return load_engine(options.engine_dir, **load_settings(options), progress=progress)


def load_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_engine_arguments` except --engine-dir, as arguments of `load_engine`."""
    names = ("device", "tuning", "gpu_memory_utilization", "deterministic")
    return {name: getattr(options, name) for name in names}


@contextmanager
def progress_bar(unit: str = "B", extra: str | None = None) -> Iterator[Progress]:
    """Yield what draws a bar for each phase from its first report on.

    It draws nothing if standard error is no terminal, or if a log is shown, whose lines would break it.

    unit: of what is reported, except in the phase `GEMM_KERNELS`.
    extra: the extra of this package that brings the progress bar's library; None: either back end's does.
    """
    disable = True if logging.getLogger(__package__).isEnabledFor(logging.INFO) else None  # None: unless a terminal
    bar: Any = None
    shown = ""

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal bar, shown
        if bar is None or phase != shown:
            if bar is not None:
                bar.close()
            tqdm = import_extra("tqdm", "the progress bar", extra).tqdm
            units = {"unit": " products"} if phase == GEMM_KERNELS else {"unit": unit, "unit_scale": True}
            bar, shown = tqdm(desc=phase, total=total or None, leave=False, disable=disable, **units), phase
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


DEFAULT_ENGINE_DIR = "engine"
