"""Talk with a chat model, turn by turn: the command `qwen-model chat`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from .command_line import (
    add_chat_arguments,
    add_engine_arguments,
    add_sampling_arguments,
    add_verbose_argument,
    chat_settings,
    given_option,
    given_sampling,
    open_engine,
    run_command,
    sampling_options,
)
from .common.errors import QwenModelError
from .common.log import show_log

DEFAULT_MAX_NEW_TOKENS = 128
ENGINE_OPTIONS = ("engine_dir", "device", "tuning", "gpu_memory_utilization", "deterministic", "generation_config")

if TYPE_CHECKING:
    from .checkpoints.chat_template import ChatOptions
    from .checkpoints.tokenizer import Tokenizer
    from .engine.session import Message


def main(arguments: list[str] | None = None) -> None:
    """Read a line and stream the answer until the input ends. The prompt of each answer is the conversation so far."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    given_sampling(options)  # raises for wrong options before the engine is loaded
    if options.url is None and options.api_key is not None:
        raise QwenModelError("--api-key is a server's: it needs --url")
    if options.api_key == "":
        raise QwenModelError("--api-key is empty")
    if options.url is not None and (name := given_option(make_parser, ENGINE_OPTIONS, arguments)):
        raise QwenModelError(f"{name} is an engine's, and --url a server's: give one of them")
    template_settings = chat_settings(options)
    if options.url is not None:
        _talk_to_server(options, template_settings)
        return

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


def _talk_to_server(options: argparse.Namespace, template_settings: dict[str, Any]) -> None:
    """Read lines and stream the answers of a server, without the oldest turns where it says they are too long."""
    from .serving.chat_client import ChatClient, PromptTooLongError

    if options.chat_template is not None:
        raise QwenModelError("a server uses its model's own chat template: --chat-template needs an engine")
    if not options.sanitize_control_tokens:
        raise QwenModelError("a server reads control tokens as text: --no-sanitize-control-tokens needs an engine")
    client = ChatClient(options.url, options.api_key or os.environ.get("QWEN_MODEL_API_KEY"))
    settings = given_sampling(options)
    for name, value in (
        ("max_tokens", DEFAULT_MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens),
        ("tools", template_settings["tools"]),
        ("chat_template_kwargs", template_settings["chat_template_kwargs"]),
    ):
        if value is not None:
            settings[name] = value
    system: list[Message] = [] if options.system is None else [{"role": "system", "content": options.system}]
    turns: list[Message] = []
    while (line := _read_line()) is not None:
        turns.append({"role": "user", "content": line})
        answer = ""
        while True:
            try:
                for text in client.stream([*system, *turns], settings):
                    print(text, end="", flush=True)
                    answer += text
                break
            except PromptTooLongError:
                if len(turns) == 1:
                    raise
                print("note: the oldest turn is left out: the conversation is too long", file=sys.stderr)
                del turns[:2]
        print()
        turns.append({"role": "assistant", "content": answer.rpartition("</think>")[2].lstrip()})


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
    server = parser.add_argument_group("server", "Talk to a server in place of an engine, to any with OpenAI's API.")
    server.add_argument("--url", metavar="URL", help="its address, such as http://127.0.0.1:8000")
    server.add_argument("--api-key", metavar="KEY", help="of the server (default: the variable QWEN_MODEL_API_KEY)")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"of an answer (default: {DEFAULT_MAX_NEW_TOKENS})"
    )
    add_sampling_arguments(parser)
    add_chat_arguments(parser, sanitize=True)
    add_verbose_argument(parser)
    return parser


def _read_line() -> str | None:
    """Read the user's next line that is not blank; return None at the end of the input."""
    try:
        while not (line := input("> " if sys.stdin.isatty() else "")).strip():
            pass
    except EOFError:
        return None
    return line


if __name__ == "__main__":
    run_command(main)
