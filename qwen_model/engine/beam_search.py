"""Run beam search by the rules of transformers' `generate(num_beams=n)` (length_penalty 1, early_stopping False).

Each step takes the best candidates of all beams of a prompt. Of the best n, those that end become finished beams; the
best n of the others go on. A prompt is done when it has n finished beams and its best running beam, at its present
length, scores no better than the worst of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..interface.device import NO_TOKEN, FloatArray, Int64Array
from . import sequences
from .scheduler import Scheduler
from .sequences import Event

_NEVER = np.float32(-1e9)


@dataclass(frozen=True)
class Beam:
    """Hold generated tokens, and the sum of their log-probabilities divided by their number."""

    tokens: list[int]
    score: float


class _Prompt:
    """Hold the beams of one prompt: sequences that are held after each step until all of them have candidates."""

    def __init__(self, scheduler: Scheduler, first: sequences.Sequence, num_beams: int, end_token_ids: frozenset[int]):
        """Take the sequence of the first beam: the others continue it after the first step."""
        self.finished: list[Beam] = []
        self.done = self.failed = False
        self._scheduler = scheduler
        self._num_beams = num_beams
        self._ends = np.array(sorted(end_token_ids), dtype=np.int64)
        self.rows = [first]
        # Only the first beam may continue at the first step: all beams are still the same.
        self._scores = np.array([0.0] + [_NEVER] * (num_beams - 1), dtype=np.float32)
        self._candidates: dict[sequences.Sequence, Event] = {}
        first.on_event = self._take

    def _take(self, event: Event) -> None:
        """Take the candidates of one beam; with those of all beams, go on to the next step."""
        self.failed = self.failed or event.token == NO_TOKEN
        self._candidates[event.sequence] = event
        if self.failed or len(self._candidates) < len(self.rows):
            return
        best = [self._candidates.pop(row).logprob for row in self.rows]
        found = np.array([[] if each is None else each.best for each in best], np.float64)
        found = np.broadcast_to(found, (self._num_beams, *found.shape[1:]))  # of the first step: one row for all beams
        sums = (found[..., 1].astype(np.float32) + self._scores[:, None]).ravel()
        # Enough that num_beams of them go on even if every beam's candidates include all end tokens.
        order = np.argsort(-sums, kind="stable")[: max(2, 1 + len(self._ends)) * self._num_beams]
        tokens = found[..., 0].ravel()[order].astype(np.int64)
        self._advance(sums[order], order // found.shape[1], tokens)

    def _advance(self, sums: FloatArray, beams: Int64Array, tokens: Int64Array) -> None:
        """Let the best candidates, best first, finish or go on."""
        running = [self.rows[min(beam, len(self.rows) - 1)].output for beam in range(self._num_beams)]
        length = len(running[0]) + 1
        at_end = len(self.rows[0].prompt) + length == self.rows[0].max_length
        ended = np.isin(tokens, self._ends) | at_end
        for i in np.flatnonzero(ended[: self._num_beams]):
            self.finished.append(Beam([*running[beams[i]], int(tokens[i])], float(sums[i]) / length))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self._num_beams]
        kept = np.argsort(-(sums + _NEVER * ended), kind="stable")[: self._num_beams]
        self._scores = (sums + _NEVER * ended)[kept].astype(np.float32)
        worst = self.finished[-1].score if len(self.finished) == self._num_beams else -np.inf
        if at_end or self._scores[0] / length <= worst:
            self.end()
            return
        sources = [min(beam, len(self.rows) - 1) for beam in beams[kept].tolist()]
        first = self.rows[0]
        while len(self.rows) < self._num_beams:
            row = beam_sequence(first.prompt, first.max_new_tokens, first.num_best)
            row.on_event = self._take
            self.rows.append(row)
        self._scheduler.advance(self.rows, sources, tokens[kept].tolist())

    def end(self) -> None:
        """Free what the beams have of the device."""
        self.done = True
        for row in self.rows:
            self._scheduler.cancel(row)


def beam_sequence(prompt: list[int], max_new_tokens: int, num_best: int | None) -> sequences.Sequence:
    """Return the sequence of a beam."""
    return sequences.Sequence(prompt, max_new_tokens, num_best=num_best, hold=True)


def beam_search(
    scheduler: Scheduler,
    beams: Sequence[sequences.Sequence],
    num_beams: int,
    end_token_ids: frozenset[int],
    step: Callable[[], None],
    not_finite: Callable[[int], Exception],
) -> list[list[Beam]]:
    """Search, and return the finished beams of each prompt, best first.

    beams: the first beam of each prompt, see `beam_sequence`; its longest output is a finished beam.
    num_beams: beams of each prompt.
    end_token_ids: a beam that ends in one of them is finished.
    step: runs the scheduler's next step, and calls `on_event` of sequences.
    not_finite: makes the error to raise for the prompt of an index whose logits are not finite before it is done.
    """
    prompts = [_Prompt(scheduler, beam, num_beams, end_token_ids) for beam in beams]
    waiting = deque(prompts)
    running: list[_Prompt] = []
    try:
        while waiting or running:
            while waiting and (not running or (len(running) + 1) * num_beams <= scheduler.device.max_sequences):
                running.append(waiting.popleft())
                scheduler.add(running[-1].rows[0])
            step()
            for index, prompt in enumerate(prompts):
                if prompt.failed:
                    raise not_finite(index)
            running = [prompt for prompt in running if not prompt.done]
    finally:
        for prompt in running:
            prompt.end()
    return [prompt.finished for prompt in prompts]
