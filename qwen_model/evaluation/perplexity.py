"""Measure the perplexity of an engine on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError
from ..engine.session import Session
from ..packaged_model import held_out_text

DEFAULT_WINDOW = 1024


@dataclass(frozen=True)
class Perplexity:
    """Hold the perplexity of one text, and what it was measured over.

    per_token: exp of the mean of -log p over the predicted tokens; compares models with the same tokenizer.
    bits_per_byte: the sum of -log2 p, divided by the bytes of the text; compares any models.
    tokens: the number of predicted tokens.
    bytes: the UTF-8 bytes of the text, without special tokens.
    window: tokens that see one another; no token sees another window's.
    """

    per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int


def log_probabilities(logits: npt.NDArray[np.floating], token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return log p(token), in nats, of each token given the logits before it, [tokens, vocab_size]."""
    scores = np.asarray(logits, dtype=np.float32)
    scores = scores - scores.max(axis=-1, keepdims=True)  # not in place: the array is the caller's
    log_sums = np.log(np.exp(scores).sum(axis=-1, dtype=np.float64))
    return np.asarray(scores[np.arange(len(token_ids)), token_ids] - log_sums)


def next_token_nats(
    logits: Callable[[Sequence[int]], npt.NDArray[np.floating]],
    token_ids: Sequence[int],
    window: int = DEFAULT_WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Sum -log p(token | tokens before it in its window), in nats, over all ``token_ids`` but the first.

    Args:
        logits: computes the logits, [tokens, vocab_size], after each of at most ``window`` tokens.
        token_ids: the tokens of the text.
        window: tokens of a window; its last token is the first of the next, so that each is predicted once.
        progress: called with the tokens predicted and their total.
    """
    nats, total = 0.0, len(token_ids) - 1
    for start in range(0, total, window):
        inputs, targets = token_ids[start : start + window], token_ids[start + 1 : start + window + 1]
        nats -= float(log_probabilities(logits(inputs[: len(targets)]), targets).sum())
        if progress is not None:
            progress(start + len(targets), total)
    return nats


def measure_perplexity(
    session: Session,
    text: str | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of an engine.

    Args:
        session: a loaded engine that has a tokenizer.
        text: None: the packaged model's held-out text.
        window: tokens that see one another. None: 1024, or the engine's ``max_input_len`` if that is lower.
        progress: called with the tokens predicted and their total.

    Raises:
        QwenModelError: the engine has no tokenizer, the text is too short, or the window exceeds its limit.
    """
    window = checked_window(session, window)
    token_ids, num_bytes = text_tokens(session, text)
    nats = next_token_nats(session.logits, token_ids, window, progress)
    predicted = len(token_ids) - 1
    return Perplexity(math.exp(nats / predicted), nats / math.log(2) / num_bytes, predicted, num_bytes, window)


def checked_window(session: Session, window: int | None) -> int:
    """Return a window's tokens; None: 1024, or the engine's ``max_input_len`` if that is lower.

    Raises:
        QwenModelError: the window exceeds the engine's limit.
    """
    limit = session.config.limits.max_input_len
    window = min(DEFAULT_WINDOW, limit) if window is None else window
    if not 1 <= window <= limit:
        raise QwenModelError(f"the window must be 1 to {limit} tokens, the engine's max_input_len, not {window}")
    return window


def text_tokens(session: Session, text: str | None) -> tuple[list[int], int]:
    """Return the tokens of a text, and its bytes without special tokens; None: the packaged model's held-out text.

    Raises:
        QwenModelError: the engine has no tokenizer, or the text is too short.
    """
    if session.tokenizer is None:
        raise QwenModelError("measuring a perplexity needs a tokenizer, and this engine has none")
    token_ids = session.tokenizer.encode(held_out_text() if text is None else text)
    num_bytes = len(session.tokenizer.decode(token_ids).encode())
    if len(token_ids) < 2 or num_bytes == 0:
        raise QwenModelError(f"a perplexity needs a text of at least 2 tokens, this one has {len(token_ids)}")
    return token_ids, num_bytes
