"""Test how tool calls are found in answers, whole and cut into pieces at every place."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_model.serving.tool_calls import Delta, ToolCallParser, typed_value

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": ["object"]}},
        },
    },
}


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return the content, and name and arguments of each call."""
    parser = ToolCallParser([WEATHER])
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push(piece)
    deltas += parser.flush()
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.index is None:
            continue
        if delta.name is not None:
            assert delta.index == len(calls)
            calls.append([delta.name, ""])
        calls[delta.index][1] += delta.arguments
    return "".join(delta.content for delta in deltas), [(name, arguments) for name, arguments in calls]


def call(name: str, arguments: Any) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def tagged(name: str, **parameters: str) -> str:
    texts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items())
    return f"<tool_call>\n<function={name}>\n{texts}</function>\n</tool_call>"


PARIS = {"city": 'Pa}r"is\\ {', "days": [1, {"a": None}]}
ANSWERS = {
    "text": ("Hello.\n", "Hello.", []),
    "one": (call("weather", PARIS), "", [("weather", json.dumps(PARIS))]),
    "text before": ("Let me look.\n\n" + call("f", {}), "Let me look.", [("f", "{}")]),
    "two": (call("f", {"a": 1}) + "\n" + call("g", {}), "", [("f", '{"a": 1}'), ("g", "{}")]),
    "arguments first": (
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "arguments in a string": ('<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', "", [("f", '{"a":1}')]),
    "other members": (
        '<tool_call>{"id": 3, "name": "f", "x": [true, "}"], "arguments": {}}</tool_call>',
        "",
        [("f", "{}")],
    ),
    "not JSON": ("<tool_call>what</tool_call> is this", "<tool_call>what</tool_call> is this", []),
    "no name": ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "truncated": ('<tool_call>\n{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "truncated name": ('<tool_call>\n{"name": "f', '<tool_call>\n{"name": "f', []),
    "half a tag": ("a <tool", "a <tool", []),
    "tagged": (
        tagged("weather", city="Paris\n7e", days="3", units='{"t": "C"}'),
        "",
        [("weather", '{"city": "Paris\\n7e", "days": 3, "units": {"t": "C"}}')],
    ),
    "tagged without parameters": (tagged("now"), "", [("now", "{}")]),
    "tagged twice": (tagged("now") + "\n" + tagged("f", a="x"), "", [("now", "{}"), ("f", '{"a": "x"}')]),
    "tagged and truncated": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3",
        "",
        [("weather", '{"city": "Paris"')],
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_whole_and_in_single_characters(name: str) -> None:
    answer, content, calls = ANSWERS[name]
    assert parse([answer]) == (content, calls)
    assert parse(list(answer)) == (content, calls)


@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(0, 200), max_size=6))
def test_answers_cut_anywhere(name: str, places: list[int]) -> None:
    answer, content, calls = ANSWERS[name]
    cuts = [0, *sorted(min(place, len(answer)) for place in places), len(answer)]
    pieces = [answer[start:end] for start, end in pairwise(cuts)]
    assert parse(pieces) == (content, calls)


def test_a_name_is_given_before_its_arguments_are_complete() -> None:
    parser = ToolCallParser()
    assert parser.push('<tool_call>\n{"name": "f", "arguments": {"text": "ab') == [
        Delta(index=0, name="f"),
        Delta(index=0, arguments='{"text": "ab'),
    ]
    assert parser.push("c") == [Delta(index=0, arguments="c")]


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "integer"}, 3),
        ("3.5", {"type": "number"}, 3.5),
        ("True", {"type": "boolean"}, True),
        ("3", {"type": "string"}, "3"),
        ("3", {}, "3"),
        ("three", {"type": "integer"}, "three"),
        ("true", {"type": "integer"}, "true"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("null", {"type": ["string", "null"]}, None),
        ("null", {"type": ["integer", "null"]}, None),
    ],
)
def test_typed_values(text: str, schema: dict[str, Any], value: Any) -> None:
    found = typed_value(text, schema)
    assert found == value
    assert type(found) is type(value)
