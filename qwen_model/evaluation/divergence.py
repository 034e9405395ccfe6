"""Compare engines by what they predict: perplexities, and how far the next token's distribution is from the first's."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..common.errors import QwenModelError
from ..engine.session import Session
from .perplexity import checked_window, text_tokens

Floats = npt.NDArray[np.float32]
OpenEngine = Callable[[str], Session]

DEFAULT_TOKENS = 4096
"""The tokens that are predicted: 2.5 GB of a temporary file with a vocabulary of 152,000."""


@dataclass(frozen=True)
class Prediction:
    """Hold how an engine predicts a text, and how it differs from the first engine, whose differences are 0.

    perplexity: exp of the mean of -log p over the predicted tokens.
    mean_divergence, largest_divergence: of the Kullback-Leibler divergences of the next token's distribution, after
        each token, from the first engine's: Σ p log(p / q), in nats, where p is the first's.
    same_token: the part of the tokens after which both find the same token the likeliest.
    tokens: the number of predicted tokens.
    """

    engine: str
    perplexity: float
    mean_divergence: float
    largest_divergence: float
    same_token: float
    tokens: int


def compare_predictions(
    engines: Sequence[str],
    open_engine: OpenEngine,
    text: str | None = None,
    window: int | None = None,
    tokens: int = DEFAULT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Prediction]:
    """Yield how each engine predicts a text, the first of them first. One engine is loaded at a time.

    The first's log-probabilities are kept in a temporary file, 4 bytes for each token of the text and the vocabulary.

    Args:
        engines: folders of engines, which must have the same tokens.
        open_engine: loads the engine in a folder; it must have a tokenizer.
        text: None: the packaged model's held-out text.
        window: tokens that see one another. None: 1024, or the first engine's ``max_input_len`` if that is lower.
        tokens: of the text that are predicted, at most.
        progress: called with the tokens predicted by an engine and their total.

    Raises:
        QwenModelError: an engine has no tokenizer or other tokens than the first, the text is too short, or the window
            exceeds an engine's limit.
        OSError: there is no room for the temporary file.
    """
    with tempfile.TemporaryFile() as file:
        first: _Text | None = None
        for engine in engines:
            file.seek(0)
            session = open_engine(engine)
            found = _text(session, text, window, tokens)
            if first is not None and found != first:
                raise QwenModelError(
                    f"{engine} has other tokens than {engines[0]}: only engines of one model, or of models with the "
                    "same tokenizer, can be compared"
                )
            reference = _written(file) if first is None else _read(file, found.vocab_size)
            first, window = found, found.window
            prediction = _predict(engine, session, found, reference, progress)
            del session  # before the next engine takes the memory
            gc.collect()
            yield prediction


@dataclass(frozen=True)
class _Text:
    """Hold the tokens that are predicted, with the one before them, and the windows that they are seen in."""

    token_ids: list[int]
    window: int
    vocab_size: int


def _text(session: Session, text: str | None, window: int | None, tokens: int) -> _Text:
    window = checked_window(session, window)
    token_ids, _ = text_tokens(session, text)
    return _Text(token_ids[: tokens + 1], window, session.config.model.vocab_size)


def _written(file: BinaryIO) -> Callable[[Floats], Floats]:
    """Return a function that writes log-probabilities and returns them: those of the first engine are its own."""

    def write(found: Floats) -> Floats:
        file.write(found.tobytes())
        return found

    return write


def _read(file: BinaryIO, vocab_size: int) -> Callable[[Floats], Floats]:
    """Return a function that reads the first engine's log-probabilities of as many tokens."""
    return lambda found: np.frombuffer(file.read(found.nbytes), np.float32).reshape(-1, vocab_size)


def _predict(
    engine: str,
    session: Session,
    text: _Text,
    reference: Callable[[Floats], Floats],
    progress: Callable[[int, int], None] | None,
) -> Prediction:
    """Run the engine over the windows of the text, and compare each with the first engine's."""
    ids, total = text.token_ids, len(text.token_ids) - 1
    nats = divergence = largest = 0.0
    same = 0
    for start in range(0, total, text.window):
        end = min(start + text.window, total)
        found = log_softmax(session.logits(ids[start:end]))
        expected = reference(found)
        nats -= float(found[np.arange(len(found)), ids[start + 1 : end + 1]].sum(dtype=np.float64))
        each = (np.exp(expected) * (expected - found)).sum(axis=1, dtype=np.float64)
        divergence += float(each.sum())
        largest = max(largest, float(each.max()))
        same += int((expected.argmax(axis=1) == found.argmax(axis=1)).sum())
        if progress is not None:
            progress(end, total)
    return Prediction(engine, math.exp(nats / total), divergence / total, largest, same / total, total)


def log_softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Return the log-probabilities of logits, [tokens, vocab_size]."""
    scores = np.asarray(logits, np.float32)
    scores = scores - scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return scores
