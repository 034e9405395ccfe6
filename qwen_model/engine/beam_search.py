"""Run beam search by the rules of transformers' `generate(num_beams=n)` (length_penalty 1, early_stopping False).

Each step takes the best candidates of all beams of a prompt. Of the best n, those that end become finished beams; the
best n of the others go on. A prompt is done when it has n finished beams and its best running beam, at its present
length, scores no better than the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..interface.executor import Executor, FloatArray, IntArray

_NEVER = np.float32(-1e9)


@dataclass(frozen=True)
class Beam:
    """Hold generated tokens, and the sum of their log-probabilities divided by their number."""

    tokens: list[int]
    score: float


@dataclass
class _Prompt:
    """Hold the beams of one prompt."""

    num_beams: int
    running: list[list[int]]
    scores: FloatArray  # [beams]: sums of log-probabilities
    finished: list[Beam] = field(default_factory=list)
    done: bool = False

    def advance(self, sums: FloatArray, beams: IntArray, tokens: IntArray, ended: np.ndarray) -> IntArray:
        """Take the candidates of a step, best first; return the index of the beam that each running beam continues."""
        length = len(self.running[0]) + 1
        if not self.done:
            for i in np.flatnonzero(ended[: self.num_beams]):
                candidate = [*self.running[beams[i]], int(tokens[i])]
                self.finished.append(Beam(candidate, float(sums[i]) / length))
            self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.num_beams]
        kept = np.argsort(-(sums + _NEVER * ended), kind="stable")[: self.num_beams]
        self.running = [[*self.running[beams[i]], int(tokens[i])] for i in kept]
        self.scores = (sums + _NEVER * ended)[kept].astype(np.float32)
        if len(self.finished) == self.num_beams and self.scores[0] / length <= self.finished[-1].score:
            self.done = True
        return beams[kept]


def beam_search(
    executor: Executor,
    prompts: Sequence[Sequence[int]],
    num_beams: int,
    max_new_tokens: int,
    end_token_ids: frozenset[int],
    not_finite: Callable[[int], Exception],
    on_step: Callable[[], None] = lambda: None,
) -> list[list[Beam]]:
    """Search, and return the finished beams of each prompt, best first.

    num_beams: beams of each prompt. max_new_tokens: a beam of this length is finished.
    end_token_ids: a beam that ends in one of them is finished.
    not_finite: makes the error to raise for the prompt of an index whose logits are not finite before it is done.
    on_step: called after each step.
    """
    # Only the first beam may continue at the first step: all beams of a prompt are still the same.
    first_scores = np.array([0.0] + [_NEVER] * (num_beams - 1), dtype=np.float32)
    states = [_Prompt(num_beams, [[]] * num_beams, first_scores) for _ in prompts]
    ends = np.array(sorted(end_token_ids), dtype=np.int64)
    # Enough that num_beams of them go on even if every beam's candidates include all end tokens.
    count = max(2, 1 + len(ends)) * num_beams
    executor.begin_beams(prompts, num_beams)
    for step in range(1, max_new_tokens + 1):
        sums, beams, tokens = executor.beam_candidates(np.stack([state.scores for state in states]), count)
        on_step()
        for index in np.flatnonzero(np.isnan(sums).any(-1)):
            if not states[index].done:
                raise not_finite(int(index))
        ended = np.isin(tokens, ends) | (step == max_new_tokens)
        sources = [state.advance(*found) for state, *found in zip(states, sums, beams, tokens, ended, strict=True)]
        if step == max_new_tokens or all(state.done for state in states):
            break
        rows = np.concatenate([index * num_beams + source for index, source in enumerate(sources)])
        executor.decode_beams(rows, np.array([beam[-1] for state in states for beam in state.running]))
    return [state.finished for state in states]
