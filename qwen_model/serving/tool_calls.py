"""Find the tool calls in a model's answer, as it comes: the texts of Qwen2.5 and Qwen3, and of Qwen3-Coder.

Qwen2.5 and Qwen3 write a JSON object:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Qwen3-Coder writes tags, with values whose types only the tool's JSON schema tells:

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .reasoning import held_back

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
JSON_SPACE = " \t\r\n"
ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class Delta:
    """Hold what a piece of text adds: content, or a part of the tool call of an index.

    name: given once, at the beginning of a call. arguments: characters of the call's JSON object of arguments.
    """

    content: str = ""
    index: int | None = None
    name: str | None = None
    arguments: str = ""


class ToolCallParser:
    """Take an answer piece by piece, and return content and tool calls.

    A call that is not complete when the answer ends is not closed: its arguments are truncated JSON. A block whose
    text is neither form stays content. White space before, between and after calls is left out.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()):
        """Take the tools that the request offers, OpenAI's `{"type": "function", "function": {...}}`."""
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters = {function.get("name"): function.get("parameters") or {} for function in functions}
        self._text = ""
        self._call: _JsonCall | _TaggedCall | None = None
        self._inside = False
        self._raw = ""  # of the present block, until it is known to be a call
        self._space = ""  # white space that is content only if text follows
        self.num_calls = 0

    def push(self, piece: str) -> list[Delta]:
        """Take the next piece; return what is certain now."""
        self._text += piece
        found: list[Delta] = []
        while self._text:
            before = len(self._text), self._inside
            self._in_block(found) if self._inside else self._outside(found)
            if (len(self._text), self._inside) == before:
                break
        return found

    def flush(self) -> list[Delta]:
        """Return what was held back, at the end of the answer."""
        found: list[Delta] = []
        rest, self._text = self._text, ""
        if not self._inside:
            self._add_content(found, rest)
        elif self._call is None or not self._call.started:
            self._add_content(found, self._raw + (rest if self._call is None else ""))
        return found

    def _outside(self, found: list[Delta]) -> None:
        before, tag, rest = self._text.partition(OPEN)
        if not tag:
            end = len(self._text) - held_back(self._text, (OPEN,))
            before, rest = self._text[:end], self._text[end:]
        self._add_content(found, before)
        self._text = rest
        if tag:
            self._inside, self._raw, self._space = True, OPEN, ""

    def _add_content(self, found: list[Delta], text: str) -> None:
        given = self._space + text
        kept = given.rstrip()
        self._space = given[len(kept) :]
        if self.num_calls:
            kept = kept.lstrip()
        if kept:
            found.append(Delta(content=kept))

    def _in_block(self, found: list[Delta]) -> None:
        if self._call is None and not self._begin_call(found):
            return
        assert self._call is not None
        text, self._text = self._text, ""
        if not self._call.started:
            self._raw += text
        name, arguments = self._call.push(text)
        if name is not None:
            self.num_calls += 1
            found.append(Delta(index=self.num_calls - 1, name=name))
        if arguments:
            found.append(Delta(index=self.num_calls - 1, arguments=arguments))
        if self._call.failed and not self._call.started:
            raw, self._raw = self._raw, ""
            self._leave()
            self._add_content(found, raw)
        elif self._call.rest is not None:
            _, tag, rest = self._call.rest.partition(CLOSE)
            if tag:
                self._leave()
                self._text = rest

    def _begin_call(self, found: list[Delta]) -> bool:
        """Tell by the first characters which form the block has; return False until they are there."""
        start = self._text.lstrip(JSON_SPACE)
        if start.startswith("{"):
            self._call = _JsonCall()
        elif start.startswith(FUNCTION):
            self._call = _TaggedCall(self._parameters)
        elif start and not FUNCTION.startswith(start):
            raw, self._raw = self._raw, ""
            self._leave()
            self._add_content(found, raw)
            return False
        return self._call is not None

    def _leave(self) -> None:
        self._inside, self._call = False, None


class _JsonCall:
    """Read {"name": ..., "arguments": {...}} character by character, its members in any order."""

    def __init__(self) -> None:
        self.started = False  # whether the name was given
        self.failed = False
        self.rest: str | None = None  # the text behind the object, when it is complete
        self._state = "object"
        self._key = ""
        self._value = _JsonValue()
        self._name: str | None = None
        self._arguments = ""
        self._given = 0  # characters of the arguments

    def push(self, text: str) -> tuple[str | None, str]:
        """Take the next piece; return the name, once, and what it adds to the arguments."""
        for place, character in enumerate(text):
            if self.failed:
                break
            if self.rest is not None:
                self.rest += text[place:]
                break
            self._take(character)
        if self._name is None:
            return None, ""
        name = None if self.started else self._name
        self.started = True
        fragment, self._given = self._arguments[self._given :], len(self._arguments)
        return name, fragment

    def _take(self, character: str) -> None:
        if self._state in ("key text", "value"):
            if not self._value.take(character):  # a number or a word ends before the character
                self._end_value()
                self._take(character)
                return
            if self._streams():
                self._arguments += character if self._value.text else ""
            if self._value.done:
                self._end_value()
        elif character not in JSON_SPACE:
            self._take_mark(character)

    def _take_mark(self, character: str) -> None:
        if self._state in ("first key", "key") and character == '"':
            self._state, self._value = "key text", _JsonValue()
            self._value.take(character)
            return
        marks = {
            ("object", "{"): "first key",
            ("first key", "}"): "end",
            ("colon", ":"): "value",
            ("comma", ","): "key",
            ("comma", "}"): "end",
        }
        state = marks.get((self._state, character))
        self.failed = state is None or (state == "end" and self._name is None)
        self._state, self._value = state or "", _JsonValue()
        if state == "end":
            self.rest = ""

    def _streams(self) -> bool:
        """Tell whether characters of the value are given as they come: not those of a string that holds the JSON."""
        return self._state == "value" and self._key in ARGUMENTS and not self._value.text.startswith('"')

    def _end_value(self) -> None:
        try:
            value = json.loads(self._value.text)
        except ValueError:
            self.failed = True
            return
        if self._state == "key text":
            self._key, self._state = value, "colon"
            return
        if self._key == "name":
            self._name = value if isinstance(value, str) else None
            self.failed = self._name is None
        elif self._key in ARGUMENTS and isinstance(value, str):
            self._arguments += value
        self._state = "comma"


class _JsonValue:
    """Find the end of a JSON value that comes character by character."""

    def __init__(self) -> None:
        self.text = ""
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False

    def take(self, character: str) -> bool:
        """Take the next character; return False if the value, a number or a word, ended before it."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif not self.text and character in JSON_SPACE:
            return True
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif self._depth == 0 and (character in JSON_SPACE or character in ",}]"):
            return False
        elif character in "}]":
            self._depth -= 1
        self.text += character
        self.done = self._depth == 0 and not self._in_string and character in '"}]'
        return True


class _TaggedCall:
    """Read <function=NAME> with <parameter=NAME> tags; each parameter is given when its value is complete."""

    def __init__(self, parameters: Mapping[Any, Mapping[str, Any]]):
        self.started = False
        self.failed = False
        self.rest: str | None = None
        self._schemas = parameters
        self._properties: Mapping[str, Any] = {}
        self._text = ""
        self._num_parameters = 0

    def push(self, text: str) -> tuple[str | None, str]:
        """Take the next piece; return the name, once, and what it adds to the arguments."""
        if self.rest is not None:
            self.rest += text
            return None, ""
        self._text += text
        name = None if self.started else self._read_name()
        arguments = "{" if name is not None else ""
        while self.started and self.rest is None:
            parameter = self._read_parameter()
            if parameter is None:
                break
            arguments += parameter
        return name, arguments

    def _read_name(self) -> str | None:
        name, end, rest = self._text.partition(">")
        if not end:
            return None
        self._text, self.started = rest, True
        found = name.strip(JSON_SPACE).removeprefix(FUNCTION).strip()
        self._properties = self._schemas.get(found, {}).get("properties") or {}
        return found

    def _read_parameter(self) -> str | None:
        """Return the text of the next parameter, or the end of the arguments; None if it is not complete."""
        text = self._text.lstrip()
        if text.startswith(FUNCTION_END):
            self.rest, self._text = text[len(FUNCTION_END) :], ""
            return "}"
        name, opened, after = text.partition(">")
        value, closed, rest = after.partition(PARAMETER_END)
        if not (name.startswith(PARAMETER) and opened and closed):
            return None
        self._text = rest
        key = name.removeprefix(PARAMETER).strip()
        value = value.removeprefix("\n").removesuffix("\n")
        comma = ", " if self._num_parameters else ""
        self._num_parameters += 1
        return f"{comma}{_json(key)}: {_json(typed_value(value, self._properties.get(key) or {}))}"


def typed_value(text: str, schema: Mapping[str, Any]) -> Any:
    """Return a parameter's text as the type that its JSON schema names; text that is not of that type stays text."""
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds or []
    if not kinds or "string" in kinds:
        return None if "null" in kinds and text.strip() == "null" else text
    try:
        value = json.loads(text.strip().lower() if "boolean" in kinds else text)
    except ValueError:
        return text
    types: dict[str, Any] = {
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "object": dict,
        "array": list,
        "null": type(None),
    }
    fits = any(isinstance(value, types.get(kind, object)) for kind in kinds)
    return value if fits and (not isinstance(value, bool) or "boolean" in kinds) else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
