"""Write log-probabilities as OpenAI's two endpoints do."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from ..checkpoints.tokenizer import Tokenizer
from .wire import Token

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have, as in OpenAI's API."""

PART = "bytes:"
"""Begins the text of a token of /v1/completions that has a part of a character, as in OpenAI's API."""


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


def _text(content: bytes, sign: str = "") -> str:
    """Return a token's text; if that has a part of a character, the sign, and the part's bytes in the form `\\xf0`."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return sign + content.decode(errors="backslashreplace")


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    content = tokenizer.token_bytes(token)
    return {"token": _text(content), "logprob": _finite(logprob), "bytes": list(content)}


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], num_best: int) -> dict[str, Any]:
    """Return the `logprobs` of a chat's choice or delta."""
    content = []
    for token in tokens:
        best = [_entry(tokenizer, each, value) for each, value in (token.best or [])[:num_best]]
        content.append({**_entry(tokenizer, token.token, token.logprob), "top_logprobs": best})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Collect the `logprobs` of a completion: parallel lists, with the place of each token in the text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._length = 0  # characters of the text that are complete
        self.clear()

    def clear(self) -> None:
        """Begin the lists anew, behind the text so far: for the next event of a stream."""
        self.value: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, best: Sequence[tuple[int, float]] | None) -> None:
        """Add a token; logprob is None for the first of a prompt, which nothing predicts."""
        content = self._tokenizer.token_bytes(token)
        text = _text(content, PART)
        self.value["tokens"].append(text)
        self.value["token_logprobs"].append(None if logprob is None else _finite(logprob))
        tops: dict[str, float] | None = None
        if best is not None and logprob is not None:
            tops = {}
            for each, value in (*best, (token, logprob)):  # of tokens with one text the likeliest stays
                tops.setdefault(_text(self._tokenizer.token_bytes(each), PART), _finite(value))
        self.value["top_logprobs"].append(tops)
        self.value["text_offset"].append(self._length)
        self._length += len(self._decoder.decode(content))
