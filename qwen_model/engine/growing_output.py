"""Follow the outputs of a request, token by token: their text, where they end, and the time they take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .results import FinishReason, Output, StreamEvent, Timing, TokenLogprob

if TYPE_CHECKING:
    from ..checkpoints.tokenizer import Tokenizer


class GrowingOutput:
    """Hold one prompt's output as it grows: its tokens, its text, and whether it is finished."""

    def __init__(self, index: int, stop: tuple[str, ...], tokenizer: Tokenizer | None):
        self.index = index
        self.finish_reason: FinishReason | None = None
        self._stop = stop
        self._decoder = None if tokenizer is None else tokenizer.stream_decoder()
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text = ""
        self._given = 0  # characters of the text that were returned in events

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens so far."""
        return len(self._ids)

    def push(self, token: int, finish_reason: FinishReason | None, logprob: TokenLogprob | None = None) -> StreamEvent:
        """Take the next token; return the text that it adds: none if it is an end token, with the reason "stop"."""
        self._ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self.finish_reason = finish_reason
        if finish_reason != "stop" and self._decoder is not None:
            self._text += self._decoder.push(token)
        if self.finish_reason is not None and self._decoder is not None:
            self._text += self._decoder.flush()
        self._cut_at_stop()
        end = len(self._text) - (0 if self.finish_reason else self._held_back())
        text, self._given = self._text[self._given : end], max(end, self._given)
        return StreamEvent(self.index, token, text, self.finish_reason, logprob)

    def output(self) -> Output:
        """Return the output of a finished sequence."""
        if self.finish_reason is None:
            raise RuntimeError("the sequence is not finished")
        text = None if self._decoder is None else self._text
        return Output(self._ids, text, self.finish_reason, logprobs=self._logprobs or None)

    def _cut_at_stop(self) -> None:
        places = [self._text.find(stop, self._given) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.finish_reason = "stop"

    def _held_back(self) -> int:
        """Return how many characters at the end of the text may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(longest, len(self._text)), 0, -1):
            tail = self._text[-count:]
            if any(stop.startswith(tail) for stop in self._stop):
                return count
        return 0


class Timer:
    """Measure the prefill and the decode steps of one request."""

    def __init__(self, prompts: Iterable[Sequence[int]], num_outputs: int):
        self._prompt_tokens = sum(len(prompt) for prompt in prompts)
        self._outputs = num_outputs
        self._prefill = self._decode = self._last = 0.0

    def start(self) -> None:
        """Begin to measure."""
        self._last = time.perf_counter()

    def step(self, prompt_share: float) -> None:
        """Record that a step is done; that share of its tokens, from 0 to 1, was of prompts, and the others decoded."""
        now = time.perf_counter()
        self._prefill += prompt_share * (now - self._last)
        self._decode += (1 - prompt_share) * (now - self._last)
        self._last = now

    def timing(self, generated_tokens: int) -> Timing:
        """Return the seconds and rates, given the number of tokens of all outputs."""
        decoded = generated_tokens - self._outputs
        return Timing(
            prefill_seconds=self._prefill,
            decode_seconds=self._decode,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=generated_tokens,
            prefill_tokens_per_second=self._prompt_tokens / self._prefill if self._prefill else 0.0,
            decode_tokens_per_second=decoded / self._decode if self._decode else 0.0,
        )
