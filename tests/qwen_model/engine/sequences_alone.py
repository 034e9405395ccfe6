"""What sequences of a `FakeDevice` give when they are alone, and how tests run them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from qwen_model.engine.scheduler import Scheduler
from qwen_model.engine.sequences import Event, Sequence
from qwen_model.interface.device import NO_TOKEN
from tests.support.fake_device import VOCAB, FakeDevice, Model, chosen_token, hashed_logits, log_softmax


class EvenOrOdd:
    """A mask: after an even token an odd one follows, after an odd one an even one."""

    def __init__(self) -> None:
        self.last = 0

    def allowed(self) -> np.ndarray:
        bits = np.arange(VOCAB + 31 - (VOCAB + 31) % 32) % 2 != self.last % 2
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, token: int) -> None:
        assert token % 2 != self.last % 2
        self.last = token


def alone(sequence: Sequence, model: Model = hashed_logits) -> tuple[list[int], str]:
    """The new tokens and the reason for the end."""
    tokens, output = list(sequence.prompt), []
    while len(output) < sequence.max_new_tokens:
        allowed = None
        if sequence.masker is not None:
            allowed = np.arange(VOCAB) % 2 != (output[-1] if output else 0) % 2
        logits = model(tokens, len(sequence.prompt))
        token = chosen_token(logits, sequence.sampling, sequence.draws, len(output), tokens, allowed)
        if token == NO_TOKEN:
            return output, "error"
        tokens.append(token)
        output.append(token)
        if token in sequence.end_token_ids:
            return output, "stop"
    return output, "length"


def scheduler_of(device: FakeDevice, **options: object) -> Scheduler:
    """A scheduler whose device knows which pages are in use."""
    scheduler = Scheduler(device, **options)  # type: ignore[arg-type]
    device.in_use = lambda page: scheduler.pool.users(page) > 0
    return scheduler


def run(
    scheduler: Scheduler, sequences: Iterable[Sequence], on_step: Callable[[], None] = lambda: None
) -> dict[Sequence, list[Event]]:
    """Add the sequences, and run until there is no work; return their events."""
    events: dict[Sequence, list[Event]] = {}
    for sequence in sequences:
        events[sequence] = []
        scheduler.add(sequence)
    steps = 0
    while scheduler.has_work:
        for event in scheduler.step():
            events.setdefault(event.sequence, []).append(event)
        on_step()
        steps += 1
        assert steps < 100_000, "the scheduler goes round in circles"
    return events


def check(sequence: Sequence, events: list[Event], model: Model = hashed_logits) -> None:
    """A finished sequence gave what it gives alone, token by token."""
    tokens, reason = alone(sequence, model)
    assert sequence.output == tokens
    assert sequence.finish_reason == reason
    assert [event.token for event in events] == tokens + [NO_TOKEN] * (reason == "error")
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [reason]
    for place, event in enumerate(events):
        if sequence.num_best is None or event.token == NO_TOKEN:
            continue
        logprobs = log_softmax(model(sequence.tokens[: len(sequence.prompt) + place], len(sequence.prompt)))
        assert event.logprob is not None
        assert event.logprob.logprob == logprobs[event.token]
        best = np.argsort(-logprobs, kind="stable")[: sequence.num_best]
        assert event.logprob.best == [(token, float(logprobs[token])) for token in best.tolist()]
