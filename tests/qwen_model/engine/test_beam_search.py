"""Beams that share pages, wait and are preempted find what a search over all logits finds."""

import random

import numpy as np
import pytest

from qwen_model import QwenModelError
from qwen_model.engine.beam_search import beam_search, beam_sequence
from qwen_model.engine.scheduler import Scheduler
from qwen_model.engine.sequences import Sequence
from qwen_model.interface.device import UNUSED_PAGE
from tests.qwen_model.engine.sequences_alone import check, scheduler_of
from tests.support.fake_device import VOCAB, FakeDevice, Model, hashed_logits, log_softmax

NEVER = np.float32(-1e9)


def search_of_all(
    prompt: list[int], num_beams: int, count: int, ends: set[int], model: Model
) -> list[tuple[list[int], float]]:
    """transformers' beam search for one prompt: length_penalty 1, early_stopping False."""
    running, scores = [list[int]()] * num_beams, np.array([0] + [NEVER] * (num_beams - 1), np.float32)
    finished: list[tuple[list[int], float]] = []
    for length in range(1, count + 1):
        logprobs = np.stack([log_softmax(model([*prompt, *beam], len(prompt))) for beam in running])
        sums = logprobs + scores[:, None]
        order = np.argsort(-sums.ravel(), kind="stable")[: max(2, 1 + len(ends)) * num_beams]
        candidates = [(sums.ravel()[place], running[place // VOCAB], int(place % VOCAB)) for place in order]
        ended = [token in ends or length == count for _, _, token in candidates]
        for (score, beam, token), end in list(zip(candidates, ended, strict=True))[:num_beams]:
            if end:
                finished.append(([*beam, token], float(score) / length))
        finished = sorted(finished, key=lambda found: -found[1])[:num_beams]
        kept = [each for each, end in zip(candidates, ended, strict=True) if not end][:num_beams]
        if not kept or (len(finished) == num_beams and kept[0][0] / length <= finished[-1][1]):
            break
        running, scores = [[*beam, token] for _, beam, token in kept], np.array([each[0] for each in kept])
    return finished


def search(
    scheduler: Scheduler, prompts: list[list[int]], num_beams: int, count: int, ends: set[int]
) -> list[list[tuple[list[int], float]]]:
    def step() -> None:
        for event in scheduler.step():
            if event.sequence.on_event is not None:
                event.sequence.on_event(event)

    beams = [beam_sequence(prompt, count, min(VOCAB, num_beams + len(ends))) for prompt in prompts]
    found = beam_search(
        scheduler, beams, num_beams, frozenset(ends), step, lambda index: QwenModelError(f"prompt {index}")
    )
    return [[(beam.tokens, beam.score) for beam in each] for each in found]


@pytest.mark.parametrize("seed", range(20))
def test_beams_are_those_of_a_search_over_all_logits(seed):
    source = random.Random(seed)
    num_beams = source.choice([2, 3, 5])
    device = FakeDevice(
        max_sequences=num_beams + source.randrange(4) if seed % 3 else 20,
        max_tokens=50,
        num_pages=source.choice([14, 20, 200]),
        runs_ahead=seed % 2 == 0,
        mixes=seed % 4 < 2,
    )
    scheduler = scheduler_of(device, deterministic=seed % 5 == 0, chunk_tokens=9)
    prompts = [[source.randrange(VOCAB) for _ in range(source.randint(1, 20))] for _ in range(4)]
    ends = set(source.sample(range(VOCAB), source.randrange(4)))
    beside = Sequence([1, 2, 3], 40)
    events = []
    beside.on_event = events.append
    scheduler.add(beside)
    found = search(scheduler, prompts, num_beams, 12, ends)
    for prompt, beams in zip(prompts, found, strict=True):
        expected = search_of_all(prompt, num_beams, 12, ends, hashed_logits)
        assert [tokens for tokens, _ in beams] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([score for _, score in beams], [score for _, score in expected], rtol=1e-6)
    while scheduler.has_work:
        for event in scheduler.step():
            event.sequence.on_event(event)
    check(beside, events)
    assert scheduler.pool.num_free == device.num_pages - 1


def test_beams_that_go_on_in_place_copy_no_page():
    """Of a source's rows one keeps its last page; a beam that is the only one of its source copies nothing."""
    device = FakeDevice(max_sequences=2, max_tokens=20, num_pages=40, page_size=16)
    copied: list[tuple[int, int]] = []
    copy = device.copy_pages
    device.copy_pages = lambda pairs: (copied.extend(pairs), copy(pairs))  # type: ignore[method-assign]
    scheduler = scheduler_of(device)
    rows = [Sequence([1, 2, 3], 9, num_best=2, hold=True) for _ in range(2)]
    scheduler.add(rows[0])
    scheduler.step()
    scheduler.advance(rows, [0, 0], [4, 5])
    scheduler.step()
    assert len(copied) == 1  # of the prompt's page
    scheduler.step()
    scheduler.advance(rows, [1, 0], [6, 7])
    assert [row.tokens for row in rows] == [[1, 2, 3, 5, 6], [1, 2, 3, 4, 7]]
    assert len(copied) == 1
    scheduler.step()
    scheduler.advance(rows, [1, 1], [8, 9])
    assert len(copied) == 2
    assert UNUSED_PAGE not in np.array(copied)


def after(tokens: list[int]) -> np.ndarray:
    logits = np.full(VOCAB, -30, np.float32)
    logits[tokens] = [-place for place in range(len(tokens))]
    return logits


@pytest.mark.parametrize("bad", [1, 2])
def test_a_prompt_that_is_done_may_overflow(bad):
    """The first prompt ends at once, and is computed no more; the logits of `bad` are not finite after that."""

    def model(tokens, prompt_length):
        if tokens[0] == bad and len(tokens) > 1:
            return np.full(VOCAB, np.nan, np.float32)
        return after([30, 31]) if tokens[0] == 1 else after([0, 1])

    scheduler = scheduler_of(FakeDevice(model=model))
    if bad == 1:
        first, second = search(scheduler, [[1], [2]], 2, 4, {30, 31})
        assert [tokens for tokens, _ in first] == [[30], [31]]
        assert second[0][0] == [0, 0, 0, 0]
    else:
        with pytest.raises(QwenModelError, match="prompt 1"):
            search(scheduler, [[1], [2]], 2, 4, {30, 31})
        while scheduler.has_work:
            scheduler.step()
        assert scheduler.pool.num_free == scheduler.device.num_pages - 1
