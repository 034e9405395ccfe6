"""Generate text with an engine: the command `qwen-model run`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from .command_line import (
    add_chat_arguments,
    add_engine_arguments,
    add_sampling_arguments,
    add_verbose_argument,
    chat_settings,
    given_sampling,
    non_negative_integer,
    open_engine,
    parse_token_ids,
    positive_integer,
    read_text_file,
    run_command,
    sampling_options,
)
from .common.errors import QwenModelError
from .common.log import show_log

if TYPE_CHECKING:
    from .engine.results import GenerationResult
    from .engine.session import Session

HEADING_WIDTH = 72  # characters of a prompt
CHAT_ONLY = ("system", "tools", "chat_template", "chat_template_kwargs")


def main(arguments: list[str] | None = None) -> None:
    """Generate for every prompt of the command line or the file; print text, or one JSON object."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.stream and (options.json or options.num_beams != 1):
        parser.error("--stream gives text as it comes: it cannot be combined with --json or --num-beams")
    if not options.chat and any(getattr(options, name) is not None for name in CHAT_ONLY):
        parser.error("--system, --tools, --chat-template and --chat-template-kwargs need --chat")
    if options.logprobs is not None and not options.json:
        parser.error("--logprobs needs --json")
    show_log(options.verbose)
    prompts = _prompts(parser, options)
    given_sampling(options)  # raises for wrong options before the engine is loaded
    settings: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "n": options.n,
        "stop": options.stop,
        "stop_token_ids": parse_token_ids(options.stop_token_ids, "--stop-token-ids"),
        "chat": options.chat,
        **chat_settings(options),
    }

    session = open_engine(options)
    defaults = session.config.sampling_defaults if options.num_beams == 1 else None
    settings["sampling"] = sampling_options(options, defaults)
    conversations = [_with_system(prompt, options.system) for prompt in prompts]
    shown = [prompt for prompt in prompts for _ in range(options.n)]  # of each output
    if options.stream:
        _stream(session, conversations, shown, settings)
        return
    result = session.generate(conversations, num_beams=options.num_beams, logprobs=options.logprobs, **settings)
    print(_as_json(result) if options.json else _as_text(shown, result))


def _with_system(prompt: str | list[int], system: str | None) -> Any:
    """Return a conversation of the system message, if there is one, and the text; token ids stay as they are."""
    if system is None or not isinstance(prompt, str):
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(prog="qwen-model run", description="Generate text with an engine.")
    add_engine_arguments(parser)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; several prompts are one batch")
    parser.add_argument("--input-ids", action="append", metavar="1,2,3", help="a prompt as token ids; may be repeated")
    parser.add_argument(
        "--input-file", metavar="FILE", help="a prompt on each line; blank lines are skipped; - is standard input"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 128, or the engine's limit")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--n", type=positive_integer, default=1, metavar="N", help="outputs for each prompt, drawn independently"
    )
    parser.add_argument(
        "--logprobs",
        type=non_negative_integer,
        metavar="N",
        help="with --json: the log-probability of each token, and of the N most likely ones, at most 128",
    )
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before TEXT, or at this special token; may be repeated",
    )
    parser.add_argument("--stop-token-ids", default="", metavar="1,2,3", help="end at these tokens")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question: use the model's chat template")
    add_chat_arguments(parser, sanitize=False)
    parser.add_argument("--stream", action="store_true", help="print text as it comes")
    parser.add_argument("--json", action="store_true", help="print one JSON object with the tokens and the timing")
    add_verbose_argument(parser)
    return parser


def _prompts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str | list[int]]:
    """Return the texts of the command line, then the token ids, then the lines of the file."""
    prompts: list[str | list[int]] = list(options.prompts)
    prompts += [parse_token_ids(text) for text in options.input_ids or ()]
    if options.input_file is not None:
        prompts += _read_prompts(options.input_file)
    if not prompts:
        parser.error("give a prompt, --input-ids or --input-file")
    return prompts


def _read_prompts(name: str) -> list[str]:
    text = read_text_file(name)
    prompts = [line for line in text.split("\n") if line.strip()]  # splitlines would split at form feeds, too
    if not prompts:
        raise QwenModelError(f"{'standard input' if name == '-' else name} has no prompts: expected one on each line")
    return prompts


def _stream(
    session: Session, conversations: list[Any], prompts: list[str | list[int]], settings: dict[str, Any]
) -> None:
    """Print each output's text as it comes, one output after the other, so that texts don't mix.

    prompts: of each output, for headings.
    """
    if session.tokenizer is None:
        raise QwenModelError("--stream prints text, and this engine has no tokenizer")
    events = session.stream(conversations, **settings)  # raises for a wrong prompt before anything is printed
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    place = 0  # of the output whose text is being printed; those of later ones are kept
    _print_heading(prompts, place)
    for event in events:
        texts[event.index] += event.text
        ended[event.index] = event.finish_reason is not None
        while place < len(prompts):
            print(texts[place], end="", flush=True)
            texts[place] = ""
            if not ended[place]:
                break
            print()
            place += 1
            _print_heading(prompts, place)


def _print_heading(prompts: list[str | list[int]], place: int) -> None:
    """Print a line with the beginning of a prompt, if there are several."""
    if 1 < len(prompts) > place:
        print(("\n" if place else "") + _heading(prompts[place]))


def _as_text(prompts: list[str | list[int]], result: GenerationResult) -> str:
    texts = [",".join(map(str, output.output_ids)) if output.text is None else output.text for output in result.outputs]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{_heading(prompt)}\n{text}" for prompt, text in zip(prompts, texts, strict=True))


def _heading(prompt: str | list[int]) -> str:
    """Return the beginning of a prompt in one line, marked as `head` marks the names of several files."""
    text = prompt if isinstance(prompt, str) else ",".join(map(str, prompt))
    line = text.replace("\n", "\\n")
    return f"==> {line if len(line) <= HEADING_WIDTH else line[: HEADING_WIDTH - 3] + '...'} <=="


def _as_json(result: GenerationResult) -> str:
    outputs: list[dict[str, Any]] = []
    for output in result.outputs:
        outputs.append({"output_ids": output.output_ids, "text": output.text, "finish_reason": output.finish_reason})
        if output.logprobs is not None:
            outputs[-1]["logprobs"] = [logprob._asdict() for logprob in output.logprobs]
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    return json.dumps({"outputs": outputs, "timing": dataclasses.asdict(result.timing)}, ensure_ascii=ascii_only)


if __name__ == "__main__":
    run_command(main)
