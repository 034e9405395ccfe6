"""Write log-probabilities as OpenAI's two endpoints do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checkpoints.tokenizer import Tokenizer
from .wire import Token

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have, as in OpenAI's API."""


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special_tokens=False)
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


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
        self._length = 0
        self.clear()

    def clear(self) -> None:
        """Begin the lists anew, behind the text so far: for the next event of a stream."""
        self.value: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, token: int, logprob: float | None, best: Sequence[tuple[int, float]] | None) -> None:
        """Add a token; logprob is None for the first of a prompt, which nothing predicts."""
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        self.value["tokens"].append(text)
        self.value["token_logprobs"].append(None if logprob is None else _finite(logprob))
        tops = None
        if best is not None and logprob is not None:
            tops = {self._tokenizer.decode([each], skip_special_tokens=False): _finite(value) for each, value in best}
            tops.setdefault(text, _finite(logprob))
        self.value["top_logprobs"].append(tops)
        self.value["text_offset"].append(self._length)
        self._length += len(text)
