"""A model's own chat template: Jinja, run in a sandbox, with what transformers gives to templates."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ..common.errors import QwenModelError
from ..common.extras import import_extra

DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."


def load_chat_template(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The template in ``chat_template.jinja``, else the one in ``tokenizer_config.json``, else None."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named ones, as in the form that transformers 4 wrote
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: of ``{"role": "user", "content": "..."}``, oldest first.
        add_generation_prompt: end with what opens the assistant's answer.
        special_tokens: ``bos_token`` and the like, which templates name.

    Raises:
        QwenModelError: the template is not valid, or refuses these messages.
    """
    import_extra("jinja2", "a chat template")

    try:
        compiled = _compile(template)
        return compiled.render(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **special_tokens
        )
    except Exception as error:  # a template can raise anything, of messages that it was not written for
        raise QwenModelError(f"the model's chat template failed: {error}") from error


def with_default_system_message(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages, opened by Qwen's own system message where they bring none."""
    if messages and messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": DEFAULT_SYSTEM_MESSAGE}, *messages]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises an error that names the first message that is none."""
    if not messages:
        raise QwenModelError("a chat needs at least one message, none was given")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise QwenModelError(f'message {index} must be {{"role": ..., "content": ...}}, given: {message!r}')


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
