"""python -m qwen_model.chat: talk with a chat model, turn by turn."""

from __future__ import annotations

import argparse
import sys

from .command_line import add_engine_arguments, add_sampling_arguments, run_command, sampling_options
from .errors import QwenModelError


def main(arguments: list[str] | None = None) -> None:
    """Read a line, stream the answer, and so on until the end of the input. The whole conversation is the prompt."""
    options = _parser().parse_args(arguments)
    sampling = sampling_options(options)

    from .engine import load_engine

    session = load_engine(options.engine_dir, device=options.device)
    if session.tokenizer is None:
        raise QwenModelError("a chat needs a tokenizer, and this engine has none")
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while (line := _read_line()) is not None:
        messages.append({"role": "user", "content": line})
        answer = ""
        for event in session.stream([messages], max_new_tokens=options.max_new_tokens, sampling=sampling, chat=True):
            print(event.text, end="", flush=True)
            answer += event.text
        print()
        messages.append({"role": "assistant", "content": answer})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qwen_model.chat", description="Talk with a chat model.")
    add_engine_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the chat template's)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 128)")
    add_sampling_arguments(parser)
    return parser


def _read_line() -> str | None:
    """The next line of the user's; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


if __name__ == "__main__":
    run_command(main)
