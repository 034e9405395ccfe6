"""Sequences that come, wait, share pages, are preempted and go give what each gives alone, on a device in NumPy."""

import random

import numpy as np
import pytest

from qwen_model import QwenModelError, SamplingOptions
from qwen_model.engine.sequences import Sequence
from tests.qwen_model.engine.sequences_alone import EvenOrOdd, alone, check, run, scheduler_of
from tests.support.fake_device import VOCAB, FakeDevice, hashed_logits, overflowing_logits

PREFIX = random.Random(0).choices(range(VOCAB), k=30)


def random_sequence(source: random.Random, before: list[Sequence]) -> Sequence:
    """A sequence of random prompt and settings; a few continue a common text, or have the prompt of another."""
    prompt = PREFIX[: source.choice([0, 0, 10, 30])] + [source.randrange(VOCAB) for _ in range(source.randint(1, 25))]
    parent = source.choice(before) if before and source.random() < 0.3 else None
    sampling = source.choice(
        [
            SamplingOptions(),
            SamplingOptions(repetition_penalty=1.2),
            SamplingOptions(temperature=0.8, seed=source.randrange(3)),
            SamplingOptions(top_k=5),
        ]
    )
    return Sequence(
        prompt if parent is None else list(parent.prompt),
        source.randint(1, 20),
        sampling,
        frozenset(source.sample(range(VOCAB), source.randrange(3))),
        draws=source.randrange(4),
        num_best=source.choice([None, None, 0, 3]),
        masker=EvenOrOdd() if source.random() < 0.2 else None,
        salt=source.choice([b"", b"salt"]) if parent is None else parent.salt,
        parent=parent,
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_sequences_give_what_each_gives_alone(seed):
    """Ten times a hundred, which come at random times, a tenth of which is cancelled."""
    source = random.Random(seed)
    device = FakeDevice(
        max_sequences=source.choice([1, 3, 8, 40]),
        max_tokens=source.choice([40, 64, 200]),
        num_pages=source.choice([20, 40, 400]),
        page_size=source.choice([4, 8]),
        runs_ahead=seed % 2 == 0,
        mixes=seed % 3 != 1,
        model=overflowing_logits if seed % 3 == 0 else hashed_logits,
    )
    scheduler = scheduler_of(device, chunk_tokens=source.choice([1, 7, 30]), deterministic=seed % 5 == 4)
    sequences: list[Sequence] = []
    for _ in range(100):
        sequences.append(random_sequence(source, sequences))
    coming, cancelled = sequences[20:], source.sample(sequences, 10)

    def on_step() -> None:
        if coming and source.random() < 0.3:
            scheduler.add(coming.pop(0))
        if cancelled and source.random() < 0.05:
            scheduler.cancel(cancelled.pop())

    events = run(scheduler, sequences[:20], on_step)
    while coming:
        events |= run(scheduler, [coming.pop(0)], on_step)
    for sequence in sequences:
        found = events.get(sequence, [])
        if sequence.finish_reason == "cancelled":
            assert sequence.output == alone(sequence, device.model)[0][: len(found)]
        else:
            check(sequence, found, device.model)
    assert scheduler.pool.num_free == device.num_pages - 1


def test_decode_steps_take_turns_with_chunks_of_a_long_prompt():
    device = FakeDevice(max_sequences=4, max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device, chunk_tokens=10)
    scheduler.add(Sequence([1, 2, 3], 30))
    scheduler.step()
    run(scheduler, [Sequence([5] * 45, 2)])
    kinds = [(batch.is_decode, len(batch.tokens)) for batch in device.forwards]
    assert kinds[1:12] == [*[(True, 1), (False, 10)] * 4, (True, 1), (False, 5), (True, 2)]


def test_steps_have_decode_tokens_and_chunks_of_a_long_prompt():
    device = FakeDevice(max_sequences=4, max_tokens=100, num_pages=100, mixes=True)
    scheduler = scheduler_of(device, chunk_tokens=10)
    scheduler.add(Sequence([1, 2, 3], 30))
    scheduler.step()
    run(scheduler, [Sequence([5] * 40, 2), Sequence([6], 1)])
    kinds = [(batch.num_decoding, batch.lengths.tolist()) for batch in device.forwards]
    assert kinds[:7] == [(0, [3]), *[(1, [1, 9])] * 4, (1, [1, 4, 1]), (0, [1, 1])]


def test_many_decode_tokens_leave_room_for_prompts():
    device = FakeDevice(max_sequences=12, max_tokens=100, num_pages=100, mixes=True)
    scheduler = scheduler_of(device, chunk_tokens=8)
    for place in range(9):
        scheduler.add(Sequence([1, place], 30))
    for _ in range(2):
        scheduler.step()
    run(scheduler, [Sequence([5] * 4, 1)])
    assert [batch.lengths[9:].tolist() for batch in device.forwards if batch.num_decoding] == [[2], [2]]


def test_where_decode_tokens_fill_a_step_prompts_have_their_own():
    device = FakeDevice(max_sequences=8, max_tokens=8, num_pages=100, mixes=True)
    scheduler = scheduler_of(device)
    for place in range(7):
        scheduler.add(Sequence([1, place], 30))
    for _ in range(5):
        scheduler.step()
    run(scheduler, [Sequence([5] * 20, 1)])
    assert not any(batch.num_decoding == 7 for batch in device.forwards)
    prompts = [batch.lengths.tolist() for batch in device.forwards if len(batch.lengths) == 1]
    assert prompts[:3] == [[8], [8], [4]]


def test_a_prompt_whose_logits_are_wanted_has_steps_of_its_own():
    device = FakeDevice(max_sequences=4, max_tokens=100, num_pages=100, max_logit_rows=8, mixes=True)
    scheduler = scheduler_of(device)
    scheduler.add(Sequence([1, 2, 3], 30))
    scheduler.step()
    scored = Sequence([5] * 20, 0, logit_rows=20)
    run(scheduler, [scored])
    assert np.concatenate(scored.logits).shape == (20, VOCAB)
    kinds = [(len(batch.lengths), batch.num_decoding) for batch in device.forwards[1:6]]
    assert all(kind == (1, 0) for kind in kinds)
    assert [batch.is_decode for batch in device.forwards[1:7]] == [False, True] * 3


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("num_pages", range(20, 30))
def test_a_prompt_whose_logits_are_wanted_is_preempted(num_pages, runs_ahead):
    """Its logits are computed again, all of them."""
    device = FakeDevice(3, 16, num_pages, 4, runs_ahead=runs_ahead, mixes=True)
    scheduler = scheduler_of(device)
    for token in (2, 3):
        scheduler.add(Sequence([1, token, 3], 40))
    for _ in range(3):
        scheduler.step()
    scored = Sequence([token % VOCAB for token in range(60)], 0, logit_rows=60)
    run(scheduler, [scored])
    expected = [hashed_logits(scored.prompt[: end + 1], 60) for end in range(60)]
    np.testing.assert_array_equal(np.concatenate(scored.logits), expected)


def test_a_prompt_is_one_step_where_nobody_waits_for_a_token():
    device = FakeDevice(max_sequences=4, max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device, chunk_tokens=10)
    run(scheduler, [Sequence([5] * 45, 1), Sequence([6] * 20, 1), Sequence([7] * 50, 1)])
    assert [len(batch.tokens) for batch in device.forwards] == [100, 15]


def test_a_patient_client_gets_long_steps():
    device = FakeDevice(max_sequences=4, max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device, chunk_tokens=10)
    scheduler.add(Sequence([1, 2, 3], 30))
    scheduler.step()
    scheduler.add(Sequence([5] * 45, 2))
    for _ in range(2):
        scheduler.step(patient=True)
    assert len(device.forwards[-1].tokens) == 45


def test_where_all_slots_are_taken_several_are_given_at_once():
    """A step of one prompt takes as long as one of several."""
    device = FakeDevice(max_sequences=32, max_tokens=200, num_pages=300)
    scheduler = scheduler_of(device)
    running = [Sequence([1, 2, place], 10 + place) for place in range(32)]
    run(scheduler, running + [Sequence([3, 4, place], 1) for place in range(8)])
    prompts = [len(batch.slots) for batch in device.forwards if not batch.is_decode]
    assert (prompts[0], sum(prompts)) == (32, 40)
    assert min(prompts) >= 2


def test_a_free_slot_is_not_kept_for_long():
    device = FakeDevice(max_sequences=32, max_tokens=200, num_pages=900)
    scheduler = scheduler_of(device)
    run(
        scheduler,
        [Sequence([1, 2, place], 60 if place else 5) for place in range(32)]
        + [Sequence([token, token], 1) for token in (3, 4)],
    )
    prompts = [place for place, batch in enumerate(device.forwards) if not batch.is_decode]
    assert prompts[0] == 0
    assert 5 < prompts[1] <= 5 + 1 + 8


def test_the_host_is_one_step_ahead():
    """A step is launched with the tokens that the device chose last, before these are read."""
    device = FakeDevice(runs_ahead=True)
    scheduler = scheduler_of(device)
    sequence = Sequence([1, 2, 3], 5)
    scheduler.add(sequence)
    (event,) = scheduler.step()
    assert sequence.output == [event.token]
    assert len(device.forwards) == 2
    scheduler.step()
    assert len(device.forwards) == 3
    assert device.forwards[2].tokens.tolist() == [-1]
    run(scheduler, [])
    assert len(device.forwards) == 5  # none after the last token


def test_a_prefix_is_computed_once():
    device = FakeDevice(max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device)
    run(scheduler, [Sequence(PREFIX, 3)])
    device.forwards.clear()
    second = Sequence([*PREFIX[:20], 1, 2], 1)
    run(scheduler, [second])
    assert device.forwards[0].past_lengths.tolist() == [20]
    other = Sequence([*PREFIX[:20], 1, 2], 1, salt=b"another")
    device.forwards.clear()
    run(scheduler, [other])
    assert device.forwards[0].past_lengths.tolist() == [0]
    assert second.output == other.output


def test_an_answer_is_a_prefix_too():
    """As of the next turn of a chat."""
    device = FakeDevice(max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device)
    first = Sequence(PREFIX, 12)
    run(scheduler, [first])
    device.forwards.clear()
    run(scheduler, [Sequence([*first.tokens, 5], 1)])
    assert device.forwards[0].past_lengths.tolist() == [40]


def test_a_deterministic_scheduler_shares_pages_of_prompts_only():
    device = FakeDevice(max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device, deterministic=True)
    first = Sequence(PREFIX, 12)
    run(scheduler, [first])
    device.forwards.clear()
    run(scheduler, [Sequence([*first.tokens, 5], 1)])
    assert device.forwards[0].past_lengths.tolist() == [28]  # seven pages of the prompt


def test_a_prefix_is_shared_where_the_rotary_embedding_is_equal():
    device = FakeDevice(max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device, stretch=lambda length: 1 + (length > 20))
    run(scheduler, [Sequence(PREFIX, 1), Sequence(PREFIX[:20], 1), Sequence(PREFIX[:25], 1)])
    device.forwards.clear()
    for length, past in ((18, 16), (22, 20)):
        run(scheduler, [Sequence([*PREFIX[:length], 1, 2], 1)])
        assert device.forwards[-1].past_lengths.tolist() == [past]


def test_a_sample_shares_nothing_with_a_parent_of_other_tokens():
    scheduler = scheduler_of(FakeDevice(max_tokens=100, num_pages=100))
    parent = Sequence(PREFIX, 9)
    child = Sequence(PREFIX[::-1], 9, parent=parent)
    events = run(scheduler, [parent, child])
    check(parent, events[parent])
    check(child, events[child])


def test_samples_of_a_prompt_share_its_pages():
    device = FakeDevice(max_sequences=8, max_tokens=100, num_pages=100)
    scheduler = scheduler_of(device)
    sampling = SamplingOptions(temperature=1.0, seed=3)
    first = Sequence(PREFIX, 6, sampling)
    others = [Sequence(PREFIX, 6, sampling, draws=draws, parent=first) for draws in range(1, 6)]
    used: list[int] = []
    events = run(scheduler, [first, *others], lambda: used.append(device.num_pages - 1 - scheduler.pool.num_free))
    assert sum(len(batch.tokens) for batch in device.forwards if not batch.is_decode) == len(PREFIX)
    assert max(used) == 7 + 6 * 2  # full pages of the prompt; the last of it and one of the output for each
    for sequence in (first, *others):
        check(sequence, events[sequence])
    assert len({tuple(sequence.output) for sequence in (first, *others)}) > 1


def test_the_youngest_gives_up_its_pages_and_comes_back():
    device = FakeDevice(max_sequences=3, max_tokens=40, num_pages=13)
    scheduler = scheduler_of(device)
    sequences = [Sequence([place] * 8, 30, SamplingOptions(temperature=1.0), draws=place) for place in range(3)]
    events = run(scheduler, sequences)
    for sequence in sequences:
        check(sequence, events[sequence])
    again = [batch for batch in device.forwards[1:] if not batch.is_decode]
    assert again
    assert all((batch.prompt_lengths == 8).all() and (batch.lengths > 8).any() for batch in again)


def test_a_deterministic_scheduler_preempts_nobody_and_cuts_prompts_where_it_always_does():
    source = random.Random(1)
    prompts = [[source.randrange(VOCAB) for _ in range(source.randint(1, 60))] for _ in range(30)]
    pieces: list[dict[tuple[int, ...], list[tuple[int, int]]]] = []
    for together in (False, True):
        device = FakeDevice(max_sequences=6, max_tokens=100, num_pages=60)
        scheduler = scheduler_of(device, chunk_tokens=16, deterministic=True)
        sequences = [Sequence(prompt, 9, salt=bytes([place])) for place, prompt in enumerate(prompts)]
        for group in [sequences] if together else [[sequence] for sequence in sequences]:
            for sequence, events in run(scheduler, group).items():
                check(sequence, events)
        found: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for batch in device.forwards:
            for row in np.flatnonzero(batch.past_lengths < batch.prompt_lengths):
                begin, length = int(batch.past_lengths[row]), int(batch.lengths[row])
                start = int(batch.lengths[:row].sum())
                found.setdefault(tuple(batch.tokens[start : start + length].tolist()), []).append((begin, length))
        assert all(begin % 16 == 0 and length <= 16 for value in found.values() for begin, length in value)
        pieces.append({key: sorted(value) for key, value in found.items()})
    assert pieces[0] == pieces[1]


def test_logits_of_prompts_come_in_chunks_beside_sequences_that_decode():
    device = FakeDevice(max_sequences=3, max_tokens=20, num_pages=60, max_logit_rows=4)
    scheduler = scheduler_of(device, chunk_tokens=8)
    running = Sequence([1, 2], 40)
    scored = [
        Sequence(PREFIX, 0, logit_rows=30),
        Sequence(PREFIX[:25], 0, logit_rows=3),
        Sequence([4], 0, logit_rows=1),
    ]
    events = run(scheduler, [running, *scored])
    check(running, events[running])
    for sequence in scored:
        logits = np.concatenate(sequence.logits)
        first = len(sequence.prompt) - sequence.logit_rows
        expected = [
            hashed_logits(sequence.prompt[: end + 1], len(sequence.prompt))
            for end in range(first, len(sequence.prompt))
        ]
        np.testing.assert_array_equal(logits, expected)
        assert sequence.finish_reason == "length"


def test_what_is_not_finite_ends_its_own_sequence():
    device = FakeDevice(model=overflowing_logits, runs_ahead=True)
    scheduler = scheduler_of(device)
    sequences = [Sequence([1, 7], 5), Sequence([1, 8], 5), Sequence([2], 20)]
    events = run(scheduler, sequences)
    for sequence in sequences:
        check(sequence, events[sequence], overflowing_logits)
    assert sequences[0].finish_reason == "error"
    assert sequences[1].finish_reason != "error"


class Failing(EvenOrOdd):
    def __init__(self, method: str):
        super().__init__()
        self.method = method

    def allowed(self) -> np.ndarray:
        if self.method == "allowed":
            raise ValueError("no such grammar")
        return super().allowed()

    def accept(self, token: int) -> None:
        if self.method == "accept":
            raise ValueError("no such grammar")
        super().accept(token)


@pytest.mark.parametrize("method", ["allowed", "accept"])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_mask_that_fails_ends_its_own_sequence(method, runs_ahead):
    scheduler = scheduler_of(FakeDevice(runs_ahead=runs_ahead))
    wrong, right = Sequence([1], 5, masker=Failing(method)), Sequence([2], 5, masker=EvenOrOdd())
    events = run(scheduler, [wrong, right])
    check(right, events[right])
    assert wrong.finish_reason == events[wrong][-1].finish_reason == "error"
    assert str(wrong.error) == "no such grammar"


def test_a_sequence_that_can_never_fit():
    scheduler = scheduler_of(FakeDevice(num_pages=5, page_size=4))
    with pytest.raises(
        QwenModelError, match=r"the prompt of 10 tokens and 8 new ones need 5 pages .* has 4 of 4 tokens"
    ):
        scheduler.add(Sequence([1] * 10, 8))
    fits = Sequence([1] * 10, 7)
    check(fits, run(scheduler, [fits])[fits])


def test_a_device_that_fails_cancels_all():
    device = FakeDevice()
    scheduler = scheduler_of(device)
    sequences = [Sequence([place], 5) for place in range(6)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.step()
    device.choose = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        scheduler.step()
    assert [sequence.finish_reason for sequence in sequences] == ["cancelled"] * 6
    assert not scheduler.has_work
    del device.choose
    again = Sequence([1], 5)
    check(again, run(scheduler, [again])[again])


def test_a_device_has_room_for_a_token_of_every_sequence():
    with pytest.raises(ValueError, match="max_tokens 3 is less than max_sequences 4"):
        scheduler_of(FakeDevice(max_sequences=4, max_tokens=3))
