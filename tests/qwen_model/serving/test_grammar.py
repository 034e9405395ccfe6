"""Test which schemas become grammars."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.serving.grammar import json_grammar

TREE = {"type": "object", "properties": {"next": {"$ref": "#"}, "x": {"type": "integer"}}}
ENDLESS: list[Any] = [
    {"$ref": "#"},
    {**TREE, "required": ["next"]},
    {"anyOf": [{"$ref": "#"}]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"$ref": "#"}], "minItems": 2},
    {"allOf": [{"type": "object"}, {"$ref": "#"}]},
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"$ref": "#/$defs/c%20d"}, "c d": {"$ref": "#/$defs/a~1b"}}},
]
FINITE: list[Any] = [
    TREE,
    {**TREE, "required": ["x"]},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"$ref": "#"}, "minItems": 1},
    {"anyOf": [{"type": "null"}, {**TREE, "required": ["next"]}]},
    {
        "$ref": "#/$defs/a",
        "$defs": {
            "a": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]},
            "b": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]},
        },
    },
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_a_schema_without_an_end_is_refused(schema: Any) -> None:
    with pytest.raises(QwenModelError, match="recursive without an end"):
        json_grammar(schema)


@pytest.mark.parametrize("schema", FINITE)
def test_a_recursive_schema_with_an_end_is_taken(schema: Any) -> None:
    assert json_grammar(schema)


def test_many_references_take_no_long_time() -> None:
    count = 5000
    parts = {str(i): {"anyOf": [{"$ref": f"#/$defs/{(i * 7 + k) % count}"} for k in range(2)]} for i in range(count)}
    start = time.monotonic()
    with pytest.raises(QwenModelError):
        json_grammar({"$ref": "#/$defs/0", "$defs": parts})
    assert time.monotonic() - start < 5
