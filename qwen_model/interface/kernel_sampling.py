"""Describe sequences as the sampling kernels take them, for the back ends that have these."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_plugins.sampling_starts import SequenceStart

from .device import Start
from .sampling import seed_of


def sequence_starts(sequences: Sequence[Start], vocab_size: int) -> list[SequenceStart]:
    """Return what our kernels need of sequences that start, with random seeds where none are given.

    Raises:
        QwenModelError: a token of a logit_bias is not in the vocabulary.
    """
    for start in sequences:
        start.sampling.check_vocabulary(vocab_size)
    return [_sequence_start(start, vocab_size) for start in sequences]


def _sequence_start(start: Start, vocab_size: int) -> SequenceStart:
    options = start.sampling
    return SequenceStart(
        slot=start.slot,
        greedy=options.greedy,
        temperature=options.temperature or 1.0,  # 0 is greedy: the kernel does not use it
        top_k=min(options.top_k, vocab_size),
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=options.logit_bias,
        seed=seed_of(options),
        draw_stream=start.draws,
        prompt=start.prompt,
        output=start.output,
    )
