"""A device in NumPy whose logits are a function of a sequence's tokens as they are in its pages of the cache.

A page that is wrong, not written, or overwritten changes the tokens, and what may not happen at all is an error.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen_model.interface.device import LAST_TOKEN, NO_TOKEN, UNUSED_PAGE, Batch, Chosen, Start
from qwen_model.interface.sampling import SamplingOptions

VOCAB = 40
Model = Callable[[Sequence[int], int], np.ndarray]
"""The logits after some tokens, the first of which are a prompt of that length: float32 [VOCAB]."""


def hashed_logits(tokens: Sequence[int], prompt_length: int) -> np.ndarray:
    """A model that sees every token."""
    seed = zlib.crc32(np.array([prompt_length, *tokens], np.int64).tobytes())
    return np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)


def overflowing_logits(tokens: Sequence[int], prompt_length: int) -> np.ndarray:
    """The same model, whose logits are not finite after one of the tokens."""
    return np.full(VOCAB, np.nan, np.float32) if tokens[-1] == 7 else hashed_logits(tokens, prompt_length)


def chosen_token(
    logits: np.ndarray,
    sampling: SamplingOptions,
    draws: int,
    step: int,
    seen: Sequence[int],
    allowed: np.ndarray | None = None,
) -> int:
    """The token that is chosen, by all that the choice may depend on."""
    if not np.isfinite(logits).all() or (allowed is not None and not allowed.any()):
        return NO_TOKEN
    scores = logits.copy()
    if sampling.repetition_penalty != 1.0:
        scores[list(seen)] -= sampling.repetition_penalty
    if not sampling.greedy:
        noise = zlib.crc32(np.array([sampling.seed, draws, step], np.int64).tobytes())
        scores += 3 * np.random.default_rng(noise).standard_normal(VOCAB)
    if allowed is not None:
        scores[~allowed] = -np.inf
    return int(scores.argmax())


def unpacked(mask: np.ndarray) -> np.ndarray:
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)


@dataclass
class _Slot:
    sampling: SamplingOptions
    draws: int
    seen: list[int]
    step: int
    last: int = 0


@dataclass
class _Pending:
    device: FakeDevice
    chosen: Chosen | None = None

    def wait(self) -> Chosen:
        while self.chosen is None:
            self.device.run_next()
        return self.chosen


@dataclass
class FakeDevice:
    """See `Device`. If it runs ahead, nothing is computed before it is waited for.

    in_use: whether a page may be read and written; the scheduler's pool knows.
    """

    max_sequences: int = 4
    max_tokens: int = 16
    num_pages: int = 24
    page_size: int = 4
    max_logit_rows: int = 4
    runs_ahead: bool = False
    mixes: bool = False
    model: Model = hashed_logits
    in_use: Callable[[int], bool] = lambda page: True
    gemm_kernels: None = None
    forwards: list[Batch] = field(default_factory=list)  # all that were run

    def __post_init__(self) -> None:
        self.cache = np.full((self.num_pages, self.page_size), -1, np.int64)
        self.slots: dict[int, _Slot] = {}
        self._queue: deque[Callable[[], None]] = deque()
        self._logits: list[tuple[int, np.ndarray]] = []  # slots and logits of the last step
        self._choosing = False  # whether a choice may follow

    def prepare(self, num_sequences: int) -> None:
        assert 1 <= num_sequences <= self.max_sequences

    def start(self, sequences: Sequence[Start]) -> None:
        assert sequences
        assert len({each.slot for each in sequences}) == len(sequences)
        given = [(each, list(each.prompt), list(each.output)) for each in sequences]

        def run() -> None:
            for each, prompt, output in given:
                self.slots[each.slot] = _Slot(each.sampling, each.draws, [*prompt, *output], len(output))

        self._enqueue(run)

    def forward(self, batch: Batch) -> None:
        self._check(batch)
        self._choosing = bool(batch.chooses.any())
        self._enqueue(lambda: self._run(batch))

    def choose(self, masks: Mapping[int, np.ndarray] | None = None, num_best: int | None = None) -> _Pending:
        assert self._choosing, "there is nothing to choose, or it was chosen"
        self._choosing = False
        pending = _Pending(self)
        given = {slot: unpacked(mask) for slot, mask in (masks or {}).items()}

        def run() -> None:
            pending.chosen = self._chosen(given, num_best)

        self._enqueue(run)
        return pending

    def logits(self, batch: Batch, rows: np.ndarray) -> np.ndarray:
        self._check(batch)
        assert not batch.chooses.any()
        assert 1 <= len(rows) <= self.max_logit_rows
        self._choosing = False
        while self._queue:
            self.run_next()
        return np.stack([self._run(batch)[row] for row in rows])

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        assert not {source for source, _ in pairs} & {target for _, target in pairs}
        assert len({target for _, target in pairs}) == len(pairs)
        assert all(self.in_use(page) for pair in pairs for page in pair)

        def run() -> None:
            for source, target in pairs:
                self.cache[target] = self.cache[source]

        self._enqueue(run)

    def run_next(self) -> None:
        self._queue.popleft()()

    def _enqueue(self, operation: Callable[[], None]) -> None:
        self._queue.append(operation)
        while self._queue and not self.runs_ahead:
            self.run_next()

    def _check(self, batch: Batch) -> None:
        count = len(batch.slots)
        assert 1 <= count <= self.max_sequences
        assert len(set(batch.slots.tolist())) == count
        assert len(batch.tokens) == batch.lengths.sum() <= self.max_tokens
        assert (batch.lengths >= 1).all()
        assert batch.num_decoding == 0 or (self.mixes and batch.num_decoding < count)
        assert (batch.lengths[: batch.num_decoding] == 1).all()
        assert batch.chooses[: batch.num_decoding].all()
        for name in ("tokens", "slots", "lengths", "past_lengths", "prompt_lengths", "pages"):
            assert getattr(batch, name).dtype == np.int32, name
        assert len(batch.past_lengths) == len(batch.prompt_lengths) == len(batch.pages) == len(batch.chooses) == count
        for pages, past, length in zip(batch.pages, batch.past_lengths, batch.lengths, strict=True):
            used = pages[: -(-(past + length) // self.page_size)].tolist()
            assert all(map(self.in_use, used)), "a page is used that no sequence has"
        self.forwards.append(batch)

    def _run(self, batch: Batch) -> list[np.ndarray]:
        """Write the tokens into the cache, and return the logits after each."""
        written: set[tuple[int, int]] = set()
        read: set[tuple[int, int]] = set()  # what earlier steps must have written
        found: list[np.ndarray] = []
        self._logits = []
        ends = np.cumsum(batch.lengths)
        for row, slot in enumerate(batch.slots.tolist()):
            past, end = int(batch.past_lengths[row]), int(batch.past_lengths[row] + batch.lengths[row])
            pages = batch.pages[row][: -(-end // self.page_size)].tolist()
            assert UNUSED_PAGE not in pages
            if batch.chooses.any():  # others are not waited for: what comes after them is in their order
                assert all(map(self.in_use, pages)), "a page was freed that a launched step uses"
            new = batch.tokens[ends[row] - batch.lengths[row] : ends[row]].tolist()
            for position, token in enumerate(new, past):
                assert 0 <= token < VOCAB or (token == LAST_TOKEN and len(new) == 1)
                place = pages[position // self.page_size], position % self.page_size
                assert place not in written, "two sequences write to one place"
                written.add(place)
                self.cache[place] = self.slots[slot].last if token == LAST_TOKEN else token
            read |= {(pages[place // self.page_size], place % self.page_size) for place in range(past)}
            tokens = self.cache[pages].ravel()[:end].tolist()
            length = int(batch.prompt_lengths[row])
            for place in range(past, end):
                found.append(self.model(tokens[: place + 1], length))
            if batch.chooses[row]:
                self._logits.append((slot, found[-1]))
        assert not read & written, "a sequence reads what another writes in the same step"
        return found

    def _chosen(self, masks: Mapping[int, np.ndarray], num_best: int | None) -> Chosen:
        tokens = []
        for slot, logits in self._logits:
            state = self.slots[slot]
            token = chosen_token(logits, state.sampling, state.draws, state.step, state.seen, masks.get(slot))
            tokens.append(token)
            state.last = max(token, 0)
            state.step += 1
            state.seen.append(state.last)
        if num_best is None:
            return Chosen(np.array(tokens))
        logprobs = [log_softmax(logits) for _, logits in self._logits]
        order = [np.argsort(-each, kind="stable")[:num_best] for each in logprobs]
        return Chosen(
            np.array(tokens),
            np.array([each[token] for each, token in zip(logprobs, tokens, strict=True)], np.float32),
            np.array(order).reshape(len(tokens), -1),
            np.array([each[best] for each, best in zip(logprobs, order, strict=True)], np.float32).reshape(
                len(tokens), -1
            ),
        )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
