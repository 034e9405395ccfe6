"""qwen-model chat: talk with a chat model, turn by turn."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .command_line import add_engine_arguments, add_sampling_arguments, run_command, sampling_options
from .common.errors import QwenModelError

if TYPE_CHECKING:
    from .checkpoints.tokenizer import Tokenizer
    from .engine.session import Message


def main(arguments: list[str] | None = None) -> None:
    """Read a line, stream the answer, and so on until the end of the input. The conversation is the prompt."""
    options = make_parser().parse_args(arguments)
    sampling = sampling_options(options)

    from .engine import load_engine

    session = load_engine(options.engine_dir, device=options.device)
    tokenizer, limit = session.tokenizer, session.config.limits.max_input_len
    if tokenizer is None:
        raise QwenModelError("a chat needs a tokenizer, and this engine has none")
    messages: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    while (line := _read_line()) is not None:
        kept = _within_limit([*messages, {"role": "user", "content": line}], tokenizer, limit)
        if kept is None:
            continue
        messages, answer = kept, ""
        for event in session.stream([messages], max_new_tokens=options.max_new_tokens, sampling=sampling, chat=True):
            print(event.text, end="", flush=True)
            answer += event.text
        print()
        messages.append({"role": "assistant", "content": answer})


def _within_limit(messages: list[Message], tokenizer: Tokenizer, limit: int) -> list[Message] | None:
    """The conversation without as many of its oldest turns as it takes to stay within `limit` tokens.

    None if its last message alone is too long. Both are said on standard error.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    length = 0
    for start in range(first, len(messages), 2):  # a turn is a question and its answer
        kept = messages[:first] + messages[start:]
        length = len(tokenizer.apply_chat_template(kept))
        if length <= limit:
            if start > first:
                note = f"{(start - first) // 2} of the oldest turns left out: the engine's limit is {limit} tokens"
                print(f"note: {note}", file=sys.stderr)
            return kept
    print(f"error: this message makes {length} tokens, more than the engine's limit of {limit}", file=sys.stderr)
    return None


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(prog="qwen-model chat", description="Talk with a chat model.")
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
