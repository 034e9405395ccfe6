"""Talk with a chat model, turn by turn: the command `qwen-model chat`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from .command_line import (
    add_chat_arguments,
    add_engine_arguments,
    add_sampling_arguments,
    add_verbose_argument,
    chat_settings,
    given_sampling,
    open_engine,
    run_command,
    sampling_options,
)
from .common.errors import QwenModelError
from .common.log import show_log

if TYPE_CHECKING:
    from .checkpoints.chat_template import ChatOptions
    from .checkpoints.tokenizer import Tokenizer
    from .engine.session import Message


def main(arguments: list[str] | None = None) -> None:
    """Read a line and stream the answer until the input ends. The prompt of each answer is the conversation so far."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    given_sampling(options)  # raises for wrong options before the engine is loaded
    template_settings = chat_settings(options)

    from .checkpoints.chat_template import ChatOptions

    session = open_engine(options)
    if session.tokenizer is None:
        raise QwenModelError("a chat needs a tokenizer, and this engine has none")
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "sampling": sampling_options(options, session.config.sampling_defaults),
        "chat": True,
        **template_settings,
    }
    messages: list[Message] = [] if options.system is None else [{"role": "system", "content": options.system}]
    chat_options = ChatOptions(
        template_settings["tools"],
        template_settings["chat_template_kwargs"] or {},
        template_settings["chat_template"],
        template_settings["sanitize_control_tokens"],
    )
    limit = session.config.limits.max_input_len
    while (line := _read_line()) is not None:
        kept = _within_limit([*messages, {"role": "user", "content": line}], session.tokenizer, limit, chat_options)
        if kept is None:
            continue
        messages, answer = kept, ""
        for event in session.stream([messages], **settings):
            print(event.text, end="", flush=True)
            answer += event.text
        print()
        messages.append({"role": "assistant", "content": answer})


def _within_limit(
    messages: list[Message], tokenizer: Tokenizer, limit: int, options: ChatOptions
) -> list[Message] | None:
    """Return the conversation without its oldest turns, as many as it takes to stay within `limit` tokens.

    Return None if the last message alone is too long. A note on standard error says either.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    length = 0
    for start in range(first, len(messages), 2):  # a turn is a question and its answer
        kept = messages[:first] + messages[start:]
        length = len(tokenizer.apply_chat_template(kept, True, options))
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
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 128)")
    add_sampling_arguments(parser)
    add_chat_arguments(parser, sanitize=True)
    add_verbose_argument(parser)
    return parser


def _read_line() -> str | None:
    """Read the user's next line; return None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


if __name__ == "__main__":
    run_command(main)
