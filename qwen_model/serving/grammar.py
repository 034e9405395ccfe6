"""Make grammars of requests, and the masks of allowed tokens that keep an output to one, with llguidance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import numpy as np

from ..checkpoints.hugging_face_tokenizer import HuggingFaceTokenizer
from ..checkpoints.tokenizer import Tokenizer
from ..common.errors import QwenModelError
from ..common.extras import import_extra
from ..interface.device import TokenMask

LARGEST_GRAMMAR = 1 << 18  # characters
MOST_GRAMMARS = 32  # that are kept, compiled
MOST_PASSES = 8
WHITE_SPACE = "\\n?[ ]{0,20}"
"""What may be between the tokens of JSON: enough for indented lines, and not without an end."""


def _llguidance() -> Any:
    return import_extra("llguidance", "structured output", "serve")


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """Return the grammar of JSON that follows a JSON schema.

    Raises:
        QwenModelError: the schema is too large, or no JSON that ends follows it.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    text = json.dumps(schema)
    if len(text) > LARGEST_GRAMMAR:
        raise QwenModelError(f"the JSON schema has {len(text)} characters, at most {LARGEST_GRAMMAR} are allowed")
    if not _Finite(schema).is_so():
        raise QwenModelError("no JSON follows the schema: it is recursive without an end")
    # "oneOf", which Pydantic writes for unions with a discriminator, is taken as "anyOf": what follows two of its
    # schemas at once is not excluded.
    overrides = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True}
    grammar: str = _llguidance().LLMatcher.grammar_from_json_schema(text, overrides=overrides)
    return grammar


class _Finite:
    """Find out whether a value of a JSON schema can end, or demands a value within a value for ever.

    What it does not know counts as finite: `max_tokens` ends such an output.
    """

    def __init__(self, schema: Mapping[str, Any] | bool):
        self._schema = schema
        self._known: dict[str, bool] = {}
        """Of references: in a pass, False until it is known that their schema's values can end."""

    def is_so(self) -> bool:
        """Return the answer: the least fixed point over the references, reached in passes."""
        ends: set[str] = set()
        for _ in range(MOST_PASSES):
            self._known = dict.fromkeys(ends, True)
            if self._ends(self._schema):
                return True
            found = {name for name, value in self._known.items() if value}
            if found == ends:
                return False
            ends = found
        return True

    def _ends(self, schema: Any) -> bool:
        if not isinstance(schema, dict):
            return True
        if isinstance(reference := schema.get("$ref"), str) and not self._reference_ends(reference):
            return False
        for name, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            if (
                isinstance(parts := schema.get(name), list)
                and parts
                and not enough([self._ends(part) for part in parts])
            ):
                return False
        return all(map(self._ends, _demanded(schema)))

    def _reference_ends(self, reference: str) -> bool:
        if reference not in self._known:
            self._known[reference] = False
            self._known[reference] = self._ends(_referred(self._schema, reference))
        return self._known[reference]


def _demanded(schema: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of the values that every object or array of a schema has."""
    properties, required, least = schema.get("properties"), schema.get("required"), schema.get("minItems")
    if schema.get("type") == "object" and isinstance(properties, dict) and isinstance(required, list):
        return [properties[name] for name in required if isinstance(name, str) and name in properties]
    if schema.get("type") == "array" and isinstance(least, int) and least > 0:
        first = schema.get("prefixItems")
        first = first[:least] if isinstance(first, list) else []
        return [*first, schema.get("items")] if len(first) < least else first
    return []


def _referred(schema: Any, reference: str) -> Any:
    """Return the part of a schema that a JSON pointer names; None if that is none or is not there."""
    path, *names = reference.split("/")
    if path != "#":
        return None
    for name in names:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


JSON_OBJECT: Mapping[str, Any] = {"type": "object"}


def call_schema(functions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the JSON schema of a call of one of the functions, {"name": ..., "arguments": ...}."""
    return {"anyOf": [_call_of(function) for function in functions]}


def _call_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": function.get("parameters") or {"type": "object"},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class GrammarCompiler:
    """Compile grammars for the tokens of one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Iterable[int]):
        """Take a model's tokenizer, the number of its logits, and the tokens that end an output.

        Raises:
            QwenModelError: llguidance is not installed.
        """
        library = _llguidance()
        ends = list(end_token_ids)
        self._vocab_size = vocab_size
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._tokenizer = library.LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends)
        else:
            from llguidance.tiktoken import lltokenizer_from_encoding

            encoding = tokenizer.encoding  # type: ignore[attr-defined]
            self._tokenizer = lltokenizer_from_encoding(encoding, n_vocab=vocab_size, eos_token=ends)

        self._matcher = lru_cache(MOST_GRAMMARS)(self._new_matcher)

    def compile(self, grammar: str) -> GrammarState:
        """Return the state of an output that has no token yet. Grammars that came lately are compiled already.

        Raises:
            QwenModelError: the grammar is not valid.
        """
        return GrammarState(self._matcher(grammar).deep_copy(), self._vocab_size)

    def _new_matcher(self, grammar: str) -> Any:
        matcher = _llguidance().LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise QwenModelError(f"the grammar of the output is not valid: {reason[:300]}")
        return matcher


class GrammarState:
    """Tell which tokens may follow an output, and follow it; see the scheduler's masks."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._words = (vocab_size + 31) // 32

    def allowed(self) -> TokenMask:
        """Return the tokens that may come next; the end tokens alone when the output is complete."""
        mask = np.zeros(self._words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def accept(self, token: int) -> None:
        """Take the token that was chosen."""
        self._matcher.consume_token(token)
