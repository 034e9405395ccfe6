"""What the commands have in common: errors in one line, options of generation, text that fits the terminal."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from .common.errors import QwenModelError

if TYPE_CHECKING:
    from .interface.sampling import SamplingOptions


def run_command(main: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit: 0; 1 with one line on standard error for what a user can put right; 130 on Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that half-written files are taken away
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal's encoding has not all characters
    try:
        main(arguments)
        sys.stdout.flush()
    except (QwenModelError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nothing left to say
        sys.exit(1)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        # Where standard output's device is full, the interpreter would try again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(0)


def _terminate(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--temperature and its like."""
    group = parser.add_argument_group("choice of tokens (greedy unless temperature, top-k or top-p is given)")
    group.add_argument("--temperature", type=float, metavar="T", help="divide the logits by T; 0 is greedy")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only tokens that together have P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens")


def sampling_options(arguments: argparse.Namespace) -> SamplingOptions:
    """What `add_sampling_arguments` found, checked."""
    from .interface.sampling import SamplingOptions

    return SamplingOptions(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--engine-dir and --device."""
    parser.add_argument("--engine-dir", default=DEFAULT_ENGINE_DIR, metavar="DIR", help="engine (default: %(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")


DEFAULT_ENGINE_DIR = "engine"
