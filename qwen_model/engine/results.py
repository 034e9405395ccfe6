"""Define what generation returns: outputs with their timing, or events of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Output:
    """Hold what was generated for one prompt.

    output_ids: the new tokens, up to and including the end token or the token that completed a stop string.
    text: that of the tokens before the end token, cut before the stop string; None without a tokenizer.
    finish_reason: "stop" (an end token or a requested stop) or "length" (max_new_tokens).
    beams: with beam search all beams, best first; `output_ids` are those of the first.
    logprobs: of each token, if they were asked for.
    """

    output_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    beams: list[BeamOutput] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class TokenLogprob(NamedTuple):
    """Hold the log-probability of a token, by the model's own logits, and the most likely tokens with theirs."""

    logprob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class BeamOutput:
    """Hold one beam; its score is the sum of its tokens' log-probabilities, divided by their number."""

    output_ids: list[int]
    score: float


@dataclass(frozen=True)
class Timing:
    """Hold the seconds and tokens of a whole batch. The first token of each prompt belongs to the prefill.

    The seconds of a step that has tokens of prompts and decodes others are divided by their numbers.
    """

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    generated_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class GenerationResult:
    """Hold the outputs in the order of the prompts, `n` for each, and the timing."""

    outputs: list[Output]
    timing: Timing


@dataclass(frozen=True)
class StreamEvent:
    """Hold one token of one prompt.

    index: of the output among those of the request, as in `GenerationResult`.
    text: what the token adds; empty while a character or a stop string may be incomplete.
    finish_reason: see `Output`; None if more tokens follow.
    logprob: None if it was not asked for.
    """

    index: int
    token_id: int
    text: str
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None = None
