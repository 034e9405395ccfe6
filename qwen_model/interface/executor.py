"""Defines the protocol between a session and a loaded engine: prompts in, then one token per sequence and step out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .sampling import SamplingOptions

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

NO_TOKEN = -1
"""In place of a token where the logits are not finite: NaN or +infinity among them, or nothing but -infinity."""


class PendingTokens(Protocol):
    """The tokens of one step, which the device may still be computing."""

    def wait(self) -> IntArray:
        """Block until the tokens are there; return them: [sequences], NO_TOKEN where logits were not finite."""


class Executor(Protocol):
    """A loaded engine on its device, with its cache. One batch of sequences at a time."""

    runs_ahead: bool
    """Whether `decode` returns before the step is done, so that it pays to ask for a step before reading the last."""

    def prepare(self, num_sequences: int, sampling: SamplingOptions) -> None:
        """Do the one-time work for such batches, such as capturing a CUDA graph. Forgets the batch."""

    def prefill(self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions) -> PendingTokens:
        """Begin a batch, forgetting the last one: process the prompts and choose the first token of each."""

    def decode(self) -> PendingTokens:
        """Feed the tokens chosen last and choose the next ones.

        A sequence whose last token is NO_TOKEN goes on with some token of the vocabulary, and disturbs no other.
        """

    def prompt_logits(self, prompt: Sequence[int]) -> FloatArray:
        """Return the logits [tokens, vocab_size] after each token of one prompt. Forgets the batch."""

    def begin_beams(self, prompts: Sequence[Sequence[int]], num_beams: int) -> None:
        """Begin a batch in which each prompt has `num_beams` rows, one after the other."""

    def beam_candidates(self, scores: FloatArray, count: int) -> tuple[FloatArray, IntArray, IntArray]:
        """Return the best `count` continuations of each prompt: sums of log-probabilities, beam indices, and tokens.

        `scores` [prompts, beams] are the sums so far; each result is [prompts, count], best first. If logits of a
        prompt's beams are NaN or infinite, sums of that prompt are NaN.
        """

    def decode_beams(self, rows: IntArray, tokens: IntArray) -> None:
        """Continue row i from what row `rows[i]` was, with `tokens[i]`; both [prompts * beams]."""
