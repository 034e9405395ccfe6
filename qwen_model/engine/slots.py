"""Hold what steps need of the sequences that have a slot of the device, in arrays: steps are made without loops."""

from __future__ import annotations

import heapq
from itertools import chain

import numpy as np

from ..interface.device import LAST_TOKEN, UNUSED_PAGE, Batch, Int32Array
from .sequences import Sequence


class Slots:
    """Hold sequences by slot; each array has an element, or a row, for each slot."""

    def __init__(self, count: int):
        """Begin with all slots free."""
        self.sequences: list[Sequence | None] = [None] * count
        self.free = list(range(count))  # a heap: the lowest is taken first
        self.decoding = np.zeros(count, np.bool_)  # has a next token to process, and more to choose
        self.next = np.full(count, LAST_TOKEN, np.int32)  # token that the next decode step processes
        self.past = np.zeros(count, np.int32)  # positions that launched steps write
        self.prompt_lengths = np.zeros(count, np.int32)
        self.left = np.zeros(count, np.int32)  # tokens that no launched step chooses yet
        self.last_step = np.zeros(count, np.int64)  # number of the last launched step
        self.num_best = np.full(count, -1, np.int32)  # -1: no log-probabilities
        self.masked = np.zeros(count, np.bool_)
        self.holds = np.zeros(count, np.bool_)
        self.num_pages = np.zeros(count, np.int32)
        self._pages = np.zeros((count, 8), np.int32)  # in the order of positions, UNUSED_PAGE behind them

    def at(self, slots: Int32Array) -> list[Sequence]:
        """Return the sequences that have these slots, each of which is taken."""
        return [each for slot in slots.tolist() if (each := self.sequences[slot]) is not None]

    def youngest(self) -> Sequence:
        """Return the sequence that came last; there must be one."""
        return max((each for each in self.sequences if each is not None), key=lambda each: each.order)

    def place(self, sequence: Sequence, slot: int, pages: list[int], past: int) -> None:
        """Give a slot and pages to a sequence whose first `past` positions are in the cache."""
        sequence.slot, sequence.pages, sequence.num_named = slot, [], 0
        self.sequences[slot] = sequence
        self.decoding[slot] = False
        self.past[slot] = past
        self.prompt_lengths[slot] = len(sequence.prompt)
        self.left[slot] = sequence.max_length - len(sequence.tokens)
        self.last_step[slot] = 0
        self.num_best[slot] = -1 if sequence.num_best is None else sequence.num_best
        self.masked[slot] = sequence.masker is not None
        self.holds[slot] = sequence.hold
        self._pages[slot] = UNUSED_PAGE
        self.num_pages[slot] = 0
        self.add_pages(sequence, pages)

    def add_pages(self, sequence: Sequence, pages: list[int]) -> None:
        """Append pages to those of a sequence; the table grows with the longest."""
        begin, width = len(sequence.pages), self._pages.shape[1]
        sequence.pages = sequence.pages + pages
        end = len(sequence.pages)
        if end > width:
            more = max(end, 2 * width) - width
            self._pages = np.pad(self._pages, ((0, 0), (0, more)), constant_values=UNUSED_PAGE)
        self._pages[sequence.slot, begin:end] = pages
        self.num_pages[sequence.slot] = end

    def decode_last_token(self, sequence: Sequence) -> None:
        """Let a sequence all of whose tokens but the last are in the cache go on with a decode step."""
        self.next[sequence.slot] = sequence.tokens[-1]
        self.decoding[sequence.slot] = True

    def remove(self, sequence: Sequence) -> None:
        """Free the slot of a sequence."""
        if (slot := sequence.slot) is not None:
            self.sequences[slot], self.decoding[slot], sequence.slot = None, False, None
            heapq.heappush(self.free, slot)

    def batch(self, decoding: Int32Array, parts: list[tuple[Sequence, int]]) -> Batch:
        """Describe a step of one token of each of the slots `decoding`, and of prompts behind them.

        parts: sequences with the number of their next tokens; those that are complete then choose.
        """
        ones = np.ones(len(decoding), np.int32)
        chosen = ones.astype(np.bool_)
        if not parts:
            return self._batch(self.next[decoding], decoding, ones, chosen)
        tokens, slots, lengths, chooses = self._prompts(parts)
        if not len(decoding):
            return self._batch(tokens, slots, lengths, chooses)
        return self._batch(
            np.concatenate([self.next[decoding], tokens]),
            np.concatenate([decoding, slots]),
            np.concatenate([ones, lengths]),
            np.concatenate([chosen, chooses]),
            num_decoding=len(decoding),
        )

    def _prompts(self, parts: list[tuple[Sequence, int]]) -> tuple[Int32Array, Int32Array, Int32Array, np.ndarray]:
        """Return the packed tokens, and slot, length and whether it chooses of each sequence."""
        slots = np.array([sequence.slot for sequence, _ in parts], np.int32)
        lengths = np.array([length for _, length in parts], np.int32)
        past = self.past[slots].tolist()
        tokens = [sequence.tokens[begin : begin + n] for (sequence, n), begin in zip(parts, past, strict=True)]
        chooses = [
            begin + length == len(sequence.tokens) and not sequence.logit_rows
            for (sequence, length), begin in zip(parts, past, strict=True)
        ]
        return np.fromiter(chain.from_iterable(tokens), np.int32), slots, lengths, np.array(chooses)

    def _batch(
        self, tokens: Int32Array, slots: Int32Array, lengths: Int32Array, chooses: np.ndarray, num_decoding: int = 0
    ) -> Batch:
        pages = self._pages[slots, : self.num_pages[slots].max()]
        past, prompts = self.past[slots], self.prompt_lengths[slots]
        return Batch(tokens, slots, lengths, past, prompts, pages, chooses, num_decoding)

    def advance(self, batch: Batch, step: int) -> None:
        """Write down that a step, of that number, is launched."""
        self.past[batch.slots] += batch.lengths
        self.last_step[batch.slots] = step
        slots = batch.slots[batch.chooses]
        self.left[slots] -= 1
        self.next[slots] = LAST_TOKEN
        self.decoding[slots] = (self.left[slots] > 0) & ~self.holds[slots]
