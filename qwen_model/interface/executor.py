"""Define what a session asks of a loaded engine: it takes prompts, and gives one token per sequence and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .engine_config import GemmKernels
from .sampling import SamplingOptions

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

NO_TOKEN = -1
"""Stands for a token where the logits hold NaN or +infinity, or are all -infinity."""


def last_rows(prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> IntArray:
    """Return where the last `counts[i]` tokens of each prompt are if the prompts lie one after the other."""
    ends = np.cumsum([len(prompt) for prompt in prompts])
    return np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])


class PendingTokens(Protocol):
    """Hold the tokens of one step, which the device may still be computing."""

    def wait(self) -> IntArray:
        """Block until the tokens are computed; return them, int64 [sequences], NO_TOKEN where logits are not finite."""


class Executor(Protocol):
    """Run a loaded engine on its device, with its cache, for one batch of sequences at a time."""

    runs_ahead: bool
    """Whether `decode` returns before its step is done: callers should then start the next step before they wait."""

    gemm_kernels: GemmKernels | None
    """The kernels of this project that compute the linear layers; None: they are not used."""

    def prepare(self, num_sequences: int, sampling: SamplingOptions) -> None:
        """Do the one-time work for batches of this kind, such as capturing a CUDA graph; end the current batch."""

    def prefill(self, prompts: Sequence[Sequence[int]], sampling: SamplingOptions) -> PendingTokens:
        """Begin a batch in place of the current one: process the prompts and choose the first token of each."""

    def decode(self) -> PendingTokens:
        """Process the tokens chosen last and choose the next ones.

        A sequence whose last token is NO_TOKEN continues with some token of the vocabulary, and affects no other.
        """

    def prompt_logits(self, prompt: Sequence[int]) -> FloatArray:
        """Return the logits after each token of one prompt, float32 [tokens, vocab_size]; end the current batch."""

    def last_logits(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> FloatArray:
        """Return the logits after each of the last `counts[i]` tokens of `prompts[i]`; end the current batch.

        The result is float32 [sum of counts, vocab_size], one prompt after the other.
        """

    def begin_beams(self, prompts: Sequence[Sequence[int]], num_beams: int) -> None:
        """Begin a batch in which each prompt has `num_beams` rows, one after the other."""

    def beam_candidates(self, scores: FloatArray, count: int) -> tuple[FloatArray, IntArray, IntArray]:
        """Return the best `count` continuations of each prompt: sums of log-probabilities, beam indices, and tokens.

        `scores`, float32 [prompts, beams], are the sums so far. Each result is [prompts, count], best first. The sums
        of a prompt are NaN if logits of its beams are NaN or infinite.
        """

    def decode_beams(self, rows: IntArray, tokens: IntArray) -> None:
        """Replace row i by what row `rows[i]` was, and continue it with `tokens[i]`; both are [prompts * beams]."""
