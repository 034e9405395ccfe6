"""Render a model's chat templates: sandboxed Jinja, with the names that transformers gives to templates."""

from __future__ import annotations

import datetime
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from ..common.errors import QwenModelError, shown
from ..common.extras import import_extra
from ..common.files import is_file, read_text

DEFAULT_SYSTEM_MESSAGE = "You are a helpful assistant."
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
MAX_REASON = 200
MAX_PRODUCT, MAX_FACTOR = 1 << 24, 1000  # of * and of ** in a template
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names under which servers return it

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ChatOptions:
    """Hold what a chat is rendered with, besides its messages.

    Attributes:
        tools: JSON schemas of functions that the model may call, as OpenAI's and transformers' ``tools``.
        template_kwargs: variables of the template, such as Qwen3's ``enable_thinking``.
        template: the name of one of the model's templates, or Jinja source. None: the one called ``tool_use`` if there
            are tools and the model has it, else the default one.
        sanitize_control_tokens: read control tokens in messages, tools and variables as ordinary text; those that the
            template itself writes stay control tokens.

    Raises:
        QwenModelError: an option is of a wrong type.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template: str | None = None
    sanitize_control_tokens: bool = False

    def __post_init__(self) -> None:
        tools, variables = self.tools, self.template_kwargs
        if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
            raise QwenModelError(f"tools must be a list of JSON schemas, not {shown(tools)}")
        if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
            raise QwenModelError(
                f"chat_template_kwargs must map names of the template to values, not {shown(variables)}"
            )
        for name in ("messages", "tools"):
            if name in variables:
                raise QwenModelError(
                    f"{name} cannot be given in chat_template_kwargs: they are an argument of their own"
                )
        if self.template is not None and not isinstance(self.template, str):
            raise QwenModelError(f"chat_template must be a name or Jinja source, not {shown(self.template)}")
        if not isinstance(self.sanitize_control_tokens, bool):
            raise QwenModelError(
                f"sanitize_control_tokens must be True or False, not {shown(self.sanitize_control_tokens)}"
            )


def load_chat_templates(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return every template that the model brings, by name; one without a name is ``default``.

    Those in files of their own take the place of those in ``tokenizer_config.json``, as in transformers.

    Raises:
        QwenModelError: a file cannot be read, or a template has no name or is not a string.
    """
    paths = {path.stem: path for path in sorted((model_dir / TEMPLATE_FOLDER).glob("*.jinja")) if is_file(path)}
    if is_file(model_dir / TEMPLATE_FILE):
        paths["default"] = model_dir / TEMPLATE_FILE
    if paths:
        return {name: read_text(path) for name, path in paths.items()}
    given = tokenizer_config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    entries = list(given.items()) if isinstance(given, Mapping) else [_named(entry) for entry in _entries(given)]
    for name, template in entries:
        if not isinstance(name, str) or not isinstance(template, str):
            raise QwenModelError(
                "chat_template in tokenizer_config.json must be a string or a list of "
                f'{{"name": ..., "template": ...}}, not {shown(given)}'
            )
    return dict(entries)


def _entries(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _named(entry: Any) -> tuple[Any, Any]:
    return (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)


def choose_chat_template(templates: Mapping[str, str], options: ChatOptions) -> str:
    """Return the source of the template that these options ask for.

    Raises:
        QwenModelError: there is no template of that name, or none is named and none is the default.
    """
    names = ", ".join(sorted(templates)) or "none"
    if options.template is not None:
        if options.template in templates:
            return templates[options.template]
        if "{" in options.template:
            return options.template
        raise QwenModelError(f"the model has no chat template {options.template!r}; it has: {names}")
    if options.tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise QwenModelError(
            f"none of the model's chat templates is the default: choose one of {names} with chat_template "
            "(--chat-template)"
        )
    return templates["default"]


def check_chat_templates(templates: Mapping[str, str]) -> None:
    """Compile every template, to find errors before it is used; do nothing if Jinja is not installed.

    Raises:
        QwenModelError: a template is not valid; the message has its name and the line.
    """
    if importlib.util.find_spec("jinja2") is None:
        return
    for name, template in templates.items():
        try:
            _compile(template)
        except Exception as error:
            raise QwenModelError(f"the model's chat template {name!r} is not valid Jinja: {one_line(error)}") from error


def render_chat_template(
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    options: ChatOptions,
) -> str:
    """Return the text of a conversation.

    Args:
        template: Jinja source.
        messages: what ``normalized_messages`` gives.
        add_generation_prompt: end with what opens the assistant's answer.
        special_tokens: ``bos_token`` and the like, which templates name.
        options: tools and variables; ``options.template`` is not used.

    Raises:
        QwenModelError: the template is not valid, refuses these messages, or does not know what it is given.
    """
    import_extra("jinja2", "a chat template")

    variables = {"documents": None, "add_generation_prompt": add_generation_prompt, **special_tokens}
    try:
        compiled = _compile(template)
        known = _variables(template)
    except Exception as error:
        raise QwenModelError(f"the model's chat template failed: {one_line(error)}") from error
    if options.tools and "tools" not in known:
        raise QwenModelError("the model's chat template takes no tools")
    unknown = sorted(set(options.template_kwargs) - known - set(variables))
    if unknown:
        raise QwenModelError(
            f"the model's chat template has no variable {', '.join(unknown)} (chat_template_kwargs); "
            f"it has: {', '.join(sorted(known - {'messages', 'tools'})) or 'none'}"
        )
    try:
        return compiled.render({**variables, "tools": options.tools, **options.template_kwargs, "messages": messages})
    except Exception as error:  # a template can raise anything for messages that it was not written for
        raise QwenModelError(f"the model's chat template failed: {one_line(error)}") from error


def normalized_messages(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages in the form that templates are written for.

    As in transformers, keys whose value is None are left out, and reasoning is called ``reasoning_content``. As in
    vLLM, ``arguments`` of tool calls that are JSON text, as OpenAI's clients send them, become objects, a message with
    tool calls and no content has an empty one, and a content in parts becomes their text, one part on each line.

    Raises:
        QwenModelError: there is no message, or one is malformed, or has parts that are not text; it gives the index.
    """
    if not messages:
        raise QwenModelError("a chat needs at least one message, none was given")
    return [_normalized(index, message) for index, message in enumerate(messages)]


def _normalized(index: int, given: Any) -> dict[str, Any]:
    message = {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
    calls = message.pop("tool_calls", None)
    if calls:
        if not _is_list(calls) or not all(isinstance(call, Mapping) for call in calls):
            raise QwenModelError(f"tool_calls of message {index} must be a list of objects, not {shown(calls)}")
        message["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        message.setdefault("content", "")
    if "role" not in message or "content" not in message:
        raise QwenModelError(
            f'message {index} must be {{"role": ..., "content": ...}} (or have tool_calls), given: {shown(given)}'
        )
    if _is_list(message["content"]):
        message["content"] = "\n".join(_text_of_part(index, part) for part in message["content"])
    reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _text_of_part(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise QwenModelError(
        f'a part of the content of message {index} must be {{"type": "text", "text": ...}}, not {shown(part)}'
    )


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the ``arguments`` of a call, or of its ``function``; text that is not a JSON object stays as it is."""
    call = dict(call)
    if isinstance(call.get("function"), Mapping):
        call["function"] = _with_parsed_arguments(call["function"])
    if isinstance(call.get("arguments"), str):
        try:
            parsed = json.loads(call["arguments"] or "{}")
        except (ValueError, RecursionError):
            parsed = None
        call["arguments"] = parsed if isinstance(parsed, dict) else call["arguments"]
    return call


def with_default_system_message(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, with Qwen's default system message first if they have none."""
    if messages and messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": DEFAULT_SYSTEM_MESSAGE}, *messages]


def check_plain_chat(messages: Messages, options: ChatOptions) -> None:
    """Raise QwenModelError for what plain ChatML, which models without a template are given, has no place for."""
    given = {
        "tools": options.tools,
        "chat_template_kwargs": options.template_kwargs,
        "tool_calls": any("tool_calls" in message for message in messages),
    }
    for name, value in given.items():
        if value:
            raise QwenModelError(f"the model has no chat template, and plain ChatML has no place for {name}")


def text_after_answer(template: str, special_tokens: Mapping[str, str]) -> str:
    """Return what the template writes after an assistant's message; "" if that cannot be found out."""
    answer = "424242"  # digits: no filter for letters changes them
    question, reply = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}
    system = {"role": "system", "content": "Count."}
    # Some templates require a system message, some end an answer only if another message follows.
    for messages in ([question, reply], [system, question, reply], [question, reply, question]):
        try:
            text = render_chat_template(template, messages, False, special_tokens, ChatOptions())
        except QwenModelError:
            continue
        after = text.rpartition(answer)[2] if answer in text else ""
        if after.strip():
            return after
    return ""


@lru_cache(maxsize=8)
def literal_text(template: str) -> str:
    """Return the text and the string constants of the template, with zero bytes between them."""
    import jinja2.nodes

    tree = _compile(template).environment.parse(template)
    texts = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def one_line(error: BaseException) -> str:
    """Return an exception's message, cut to `MAX_REASON` characters, and the template's line if it has one."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
    line = getattr(error, "lineno", None)
    return text if line is None else f"{text} (line {line})"


@lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    import jinja2.meta

    environment = _compile(template).environment
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals))


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class GenerationBlock(jinja2.ext.Extension):
        """Render ``{% generation %}``, which marks the assistant's words for training, as its content."""

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

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """Refuse products and powers that would take all memory, as the sandbox does with long ranges."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Compute a product or a power, if it is of reasonable size."""
            lengths = [len(value) if isinstance(value, (str, list, tuple)) else abs(value) for value in (left, right)]
            too_large = max(lengths) > MAX_FACTOR if operator == "**" else lengths[0] * lengths[1] > MAX_PRODUCT
            if too_large:
                raise jinja2.exceptions.SecurityError(f"{operator} of operands that are too large")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template)
