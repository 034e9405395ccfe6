"""Run prompts on a `Device` as a scheduler would: chunks, shared and permuted pages, decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_model.interface.device import LAST_TOKEN, UNUSED_PAGE, Batch, Start
from qwen_model.interface.sampling import SamplingOptions


@dataclass
class Row:
    """A sequence's part of a step: its new tokens, after those that the cache has."""

    slot: int
    tokens: Sequence[int]
    past: int
    pages: Sequence[int]
    prompt_length: int
    chooses: bool = True


def batch_of(rows: Sequence[Row], num_decoding: int = 0) -> Batch:
    pages = np.full((len(rows), max(len(row.pages) for row in rows)), UNUSED_PAGE, np.int32)
    for line, row in zip(pages, rows, strict=True):
        line[: len(row.pages)] = row.pages
    numbers = [(row.slot, len(row.tokens), row.past, row.prompt_length) for row in rows]
    slots, lengths, past_lengths, prompt_lengths = np.array(numbers, np.int32).T.copy()
    tokens = np.concatenate([np.asarray(row.tokens, np.int32) for row in rows])
    chooses = np.array([row.chooses for row in rows])
    return Batch(tokens, slots, lengths, past_lengths, prompt_lengths, pages, chooses, num_decoding)


@dataclass
class Running:
    prompt: list[int]
    slot: int
    pages: list[int]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    past: int = 0
    output: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known = [*self.prompt, *self.output]  # what is run in chunks

    def start(self) -> Start:
        return Start(self.slot, self.sampling, 0, self.prompt, self.output)

    def chunk(self, size: int) -> Row:
        """The next tokens of the prompt and of what was said after it."""
        tokens = self._known[self.past : self.past + size]
        last = self.past + len(tokens) == len(self._known)
        row = Row(self.slot, tokens, self.past, self.pages, len(self.prompt), last)
        self.past += len(tokens)
        return row

    @property
    def has_chunks(self) -> bool:
        return self.past < len(self._known)

    def decode(self) -> Row:
        """The token that the device chose last."""
        self.past += 1
        return Row(self.slot, [LAST_TOKEN], self.past - 1, self.pages, len(self.prompt))


def run_chunks(device: Any, sequences: Sequence[Running], size: int) -> None:
    """Run prompts in chunks, all sequences' in one step, and keep the first token of each."""
    while left := [sequence for sequence in sequences if sequence.has_chunks]:
        batch = batch_of([sequence.chunk(size) for sequence in left])
        device.forward(batch)
        if batch.chooses.any():
            chosen = device.choose().wait().tokens
            for index, token in zip(np.flatnonzero(batch.chooses), chosen, strict=True):
                left[index].output.append(int(token))


def run_mixed(device: Any, decoding: Sequence[Running], sequences: Sequence[Running], size: int) -> None:
    """Run prompts in chunks, each in a step with a next token of all that decode."""
    while left := [sequence for sequence in sequences if sequence.has_chunks]:
        rows = [*(each.decode() for each in decoding), *(each.chunk(size) for each in left)]
        device.forward(batch_of(rows, len(decoding)))
        chosen = iter(device.choose().wait().tokens.tolist())
        for row, sequence in zip(rows, [*decoding, *left], strict=True):
            if row.chooses:
                sequence.output.append(next(chosen))


def run_decoding(device: Any, sequences: Sequence[Running], steps: int) -> None:
    """Choose `steps` more tokens of each; the host is one step behind."""
    pending = []
    for _ in range(steps):
        device.forward(batch_of([sequence.decode() for sequence in sequences]))
        pending.append(device.choose())
        if len(pending) == 2:
            _keep(sequences, pending.pop(0))
    for choice in pending:
        _keep(sequences, choice)


def _keep(sequences: Sequence[Running], choice: Any) -> None:
    for sequence, token in zip(sequences, choice.wait().tokens, strict=True):
        sequence.output.append(int(token))


def generate(device: Any, sequences: Sequence[Running], new_tokens: int, chunk: int = 1000) -> list[list[int]]:
    device.start([sequence.start() for sequence in sequences])
    run_chunks(device, sequences, chunk)
    run_decoding(device, sequences, new_tokens - 1)
    return [sequence.output for sequence in sequences]


def prompt_logits(
    device: Any, prompt: list[int], pages: list[int], chunk: int = 1000, count: int = 1000, output: Sequence[int] = ()
) -> np.ndarray:
    """The logits after each token of a prompt and of what was said after it: in chunks, until there are `count`."""
    sequence, found = Running(prompt, 0, pages, output=list(output)), []
    while sequence.has_chunks and sequence.past < count:
        row = sequence.chunk(chunk)
        row.chooses = False
        found.append(device.logits(batch_of([row]), np.arange(len(row.tokens), dtype=np.int32)))
    return np.concatenate(found)
