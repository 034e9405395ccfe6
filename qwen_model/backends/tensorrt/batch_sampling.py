"""Choose the next tokens on the GPU for one batch after the other: row i is in slot i."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ...interface.device import Start
from ...interface.sampling import Choice, SamplingOptions, seed_of
from . import cuda_runtime as cuda
from .sampling import SlotSampler


class DeviceSampler:
    """Own the kernels' state of one batch at a time; no call waits for the device."""

    def __init__(
        self, max_batch_size: int, vocab_size: int, dtype: str, stream: cuda.Stream, input_ids: cuda.DeviceArray
    ):
        """Allocate what the kernels need for logits [up to max_batch_size, vocab_size] of this type.

        input_ids: gets the tokens, with 0 for NO_TOKEN.
        """
        self._sampler = SlotSampler(max_batch_size, vocab_size, dtype, stream, input_ids.address)

    def begin(self, options: SamplingOptions, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a batch; the prompts' tokens count as seen."""
        options = dataclasses.replace(options, seed=seed_of(options))  # one for all sequences
        self._sampler.start([Start(i, options, i, prompt) for i, prompt in enumerate(prompts)])

    def choose(
        self,
        logits: cuda.DeviceArray,
        choice: Choice,
        count: int,
        tokens: cuda.DeviceArray,
        past_lengths: cuda.DeviceArray | None,
    ) -> None:
        """Choose from the first `count` rows of logits, and add 1 to the past lengths, if given.

        tokens: gets the tokens, NO_TOKEN where the logits are not finite.
        """
        variant = choice != Choice(greedy=True, penalty=False)
        past = 0 if past_lengths is None else past_lengths.address
        self._sampler.choose(logits.address, 0, count, variant, tokens.address, past)
