"""Pack what describes one step of the network into one array of int32, for one copy to the device."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..interface.device import LAST_TOKEN, UNUSED_PAGE, Batch, Int32Array
from .rotary import PromptTable, RotaryTable

ALIGNMENT = 64
"""Elements that the parts of a step begin at multiples of: TensorRT takes addresses of inputs at 256 bytes."""


def decode_sizes(max_sequences: int) -> tuple[int, ...]:
    """Return the numbers of sequences that decode steps are captured for, up to and with `max_sequences`."""
    sizes = (1, 2, 4, 8, 16, 24, 32, *range(48, 256, 16), *range(256, max_sequences, 64))
    return (*(size for size in sizes if size < max_sequences), max_sequences)


def padded(count: int, sizes: Sequence[int]) -> int:
    """Return the smallest of the sizes, in ascending order, that is at least `count`."""
    return sizes[bisect_left(sizes, count)]


def aligned(count: int) -> int:
    """Return the next multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class StepLayout:
    """Say where each part of a step of this size is in one array of int32.

    tokens, sequences, rows: of the step; rows are those whose logits are computed, at least 1.
    max_pages: columns of the page table.
    num_decoding: see `Batch`.
    """

    tokens: int
    sequences: int
    rows: int
    max_pages: int
    num_decoding: int = 0

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part, in their order.

        token_ids: those that the host knows, 0 in the place of the others. token_rows: where `pack` says that the
        token ids are. slots: of the rows whose logits are computed. prompt_cu_seqlens: only in a step that has both,
        where the prompts behind the decode tokens begin, and their end. The others are inputs of the network.
        """
        prompts = {"prompt_cu_seqlens": (self.sequences - self.num_decoding + 1,)} if self.num_decoding else {}
        return {
            "token_ids": (self.tokens,),
            "token_rows": (self.tokens,),
            "cu_seqlens": (self.sequences + 1,),
            **prompts,
            "past_lengths": (self.sequences,),
            "rotary_offsets": (self.sequences,),
            "last_token_ids": (self.rows,),
            "slots": (self.rows,),
            "pages": (self.sequences, self.max_pages),
        }

    @cached_property
    def starts(self) -> dict[str, int]:
        """Return where each part begins."""
        starts, end = {}, 0
        for name, shape in self.shapes.items():
            starts[name] = end
            end += aligned(math.prod(shape))
        return starts

    @cached_property
    def size(self) -> int:
        """Return the number of elements of the array."""
        return self.starts["pages"] + aligned(self.sequences * self.max_pages)

    def part(self, array: Int32Array, name: str) -> Int32Array:
        """Return a view of a part."""
        start, shape = self.starts[name], self.shapes[name]
        return array[start : start + math.prod(shape)].reshape(shape)


def chosen_rows(batch: Batch) -> Int32Array:
    """Return which of the packed tokens are the last of the sequences that choose."""
    return (np.cumsum(batch.lengths, dtype=np.int32) - 1)[batch.chooses]


def pack(
    batch: Batch,
    layout: StepLayout,
    table: RotaryTable,
    into: Int32Array,
    *,
    rows: Int32Array,
    spare_slot: int,
    first_row: int,
) -> PromptTable | None:
    """Write a step into the array; return the rotary table of its prompts, if they need one of their own.

    Where the layout has more sequences than the batch, those are padding: one token each, in UNUSED_PAGE.

    rows: of the packed tokens, those whose logits are computed.
    spare_slot: that of rows which are padding.
    first_row: a token id that the host knows is row first_row + (its place in the array) of what token ids are gathered
        from; that of LAST_TOKEN is the row of the sequence's slot.
    """
    sequences, tokens = len(batch.lengths), len(batch.tokens)
    padding = layout.sequences - sequences
    parts = {name: layout.part(into, name) for name in layout.shapes}
    known = batch.tokens != LAST_TOKEN
    parts["token_ids"][:tokens] = np.where(known, batch.tokens, 0)
    parts["token_ids"][tokens:] = 0
    parts["token_rows"][:] = np.arange(layout.tokens) + (first_row + layout.starts["token_ids"])
    if not known.all():
        parts["token_rows"][:tokens][~known] = np.repeat(batch.slots, batch.lengths)[~known]
    cu_seqlens = parts["cu_seqlens"]
    cu_seqlens[0] = 0
    np.cumsum(batch.lengths, out=cu_seqlens[1 : sequences + 1])
    cu_seqlens[sequences + 1 :] = tokens + 1 + np.arange(padding)
    if layout.num_decoding:
        parts["prompt_cu_seqlens"][:] = cu_seqlens[layout.num_decoding :] - layout.num_decoding
    parts["past_lengths"][:sequences] = batch.past_lengths
    parts["past_lengths"][sequences:] = 0
    own = table.prompt_table(batch.lengths, batch.past_lengths, batch.prompt_lengths)
    parts["rotary_offsets"][:sequences] = table.offsets(batch.prompt_lengths) if own is None else own.starts
    parts["rotary_offsets"][sequences:] = 0
    parts["last_token_ids"][: len(rows)] = rows
    parts["last_token_ids"][len(rows) :] = np.arange(tokens, tokens + layout.rows - len(rows)) if padding else 0
    parts["slots"][:] = spare_slot
    parts["slots"][: len(rows)] = batch.slots[np.searchsorted(cu_seqlens[1 : sequences + 1], rows, side="right")]
    parts["pages"][:] = UNUSED_PAGE  # attention may read ahead of a sequence's last page
    parts["pages"][:sequences, : batch.pages.shape[1]] = batch.pages
    return own
