"""Test which schemas become grammars."""

from __future__ import annotations

import time
from typing import Any

import pytest

from qwen_model.checkpoints.tokenizer import load_tokenizer
from qwen_model.common.errors import QwenModelError
from qwen_model.packaged_model import packaged_model_dir
from qwen_model.serving.grammar import GrammarCompiler, json_grammar

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


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = load_tokenizer(packaged_model_dir())
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def test_outputs_of_one_grammar_do_not_know_of_each_other(compiler: GrammarCompiler) -> None:
    tokenizer = load_tokenizer(packaged_model_dir())
    grammar = json_grammar({"enum": ["abc", "xyz"]})
    first, second = (compiler.compile(grammar) for _ in range(2))
    before = second.allowed()
    for token in tokenizer.encode('"abc', add_special_tokens=False):
        first.accept(token)
    assert (second.allowed() == before).all()
    assert (compiler.compile(grammar).allowed() == before).all()
    assert (first.allowed() != before).any()


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    part = {"type": "object", "properties": {"key": {"type": "string", "pattern": "[a-z]{1,50}"}}}
    schema = {"anyOf": [{**part, "title": str(i), "required": [str(i)]} for i in range(1000)]}
    grammar = json_grammar(schema)
    times = []
    for _ in range(20):
        start = time.monotonic()
        compiler.compile(grammar)
        times.append(time.monotonic() - start)
    assert sum(times[1:]) < 19 * times[0]
    assert min(times[1:]) < times[0] / 2


def test_a_wrong_grammar_is_an_error_in_one_line(compiler: GrammarCompiler) -> None:
    with pytest.raises(QwenModelError, match=r"grammar of the output is not valid: regex parse error: \( "):
        compiler.compile(json_grammar({"type": "string", "pattern": "("}))
    assert compiler.compile(json_grammar(True))


def test_one_of_is_taken_as_any_of(compiler: GrammarCompiler) -> None:
    """Pydantic writes it for unions with a discriminator."""
    kinds = [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"], "additionalProperties": False}
        for kind in ("cat", "dog")
    ]
    state = compiler.compile(json_grammar({"oneOf": kinds}))
    assert state.allowed().any()
