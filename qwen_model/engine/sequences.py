"""Define what a client gives to the scheduler, a sequence to be continued, and what comes back, an event per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from ..interface.device import FloatArray, TokenMask
from ..interface.sampling import SamplingOptions
from .results import TokenLogprob

EndReason = Literal["stop", "length", "error", "cancelled"]


class TokenMasker(Protocol):
    """Say which tokens may come next, as a grammar does."""

    def allowed(self) -> TokenMask | None:
        """Return the tokens that may come next; None: all."""

    def accept(self, token: int) -> None:
        """Take the token that was chosen."""


@dataclass(eq=False)
class Sequence:
    """Describe one prompt and how it is continued, and hold the tokens so far.

    prompt: token ids, at least one.
    max_new_tokens: the sequence ends with so many; 0: it asks for logits only.
    end_token_ids: it ends after any of them.
    draws: the number of the sequence among those of one request, so that they draw differently from one seed.
    num_best: return log-probabilities: that of each token, and of so many most likely ones. None: none.
    masker: which tokens may be chosen. An exception that it raises ends the sequence, and is its `error`.
    salt: pages of the cache are shared with sequences of the same salt only.
    logit_rows: return the logits after so many last tokens of the prompt, in `logits`, instead of new tokens.
    hold: wait for `Scheduler.advance` after each choice; the tokens that are chosen are not appended.
    parent: wait for its prompt, and share what it computed.
    on_event: for the client, to be called with each event; the scheduler does not call it.
    tokens: the prompt, then the new tokens. finish_reason: None while it is not finished.
    num_cached: tokens that were in the cache already when it began, or came back.
    """

    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    end_token_ids: frozenset[int] = frozenset()
    draws: int = 0
    num_best: int | None = None
    masker: TokenMasker | None = None
    salt: bytes = b""
    logit_rows: int = 0
    hold: bool = False
    parent: Sequence | None = None
    on_event: Callable[[Event], None] | None = None
    tokens: list[int] = field(default_factory=list)
    finish_reason: EndReason | None = None
    error: Exception | None = None
    logits: list[FloatArray] = field(default_factory=list)
    num_cached: int = 0

    # The scheduler's own: what it has of the device. Without a slot the sequence waits, or is held.
    order: tuple[int, ...] = ()
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)  # of full pages of tokens, see pages.py
    num_named: int = 0  # pages that the pool knows by their names
    max_length: int = 0  # tokens, prompt and output

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.prompt)
        self.max_length = len(self.prompt) + self.max_new_tokens

    @property
    def output(self) -> list[int]:
        """Return the new tokens."""
        return self.tokens[len(self.prompt) :]


class Event(NamedTuple):
    """Hold one new token of a sequence.

    token: NO_TOKEN if there is none because the logits were not finite, or the sequence asked for logits.
    finish_reason: None if more tokens follow; "stop": an end token; "length"; "error": see `Sequence.error`, None if
        the logits were not finite.
    """

    sequence: Sequence
    token: int
    finish_reason: EndReason | None
    logprob: TokenLogprob | None
