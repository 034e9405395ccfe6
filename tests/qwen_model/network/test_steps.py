"""What describes a step, packed into one array: every part, padding, tokens that only the device knows."""

import numpy as np
import pytest

from qwen_model.interface.device import LAST_TOKEN, UNUSED_PAGE, Batch
from qwen_model.network.rotary import rotary_table
from qwen_model.network.steps import StepLayout, chosen_rows, decode_sizes, pack, padded
from tests.qwen_model.network.test_rotary import QWEN_V1, read_config

FIRST_ROW, SPARE = 1000, 99


def batch_of(tokens, slots, lengths, past_lengths, pages, chooses=None, num_decoding=0):
    chooses = [True] * len(slots) if chooses is None else chooses
    prompts = [past + length for past, length in zip(past_lengths, lengths, strict=True)]
    arrays = (np.array(values, np.int32) for values in (tokens, slots, lengths, past_lengths, prompts, pages))
    return Batch(*arrays, np.array(chooses, bool), num_decoding)


def packed(batch, layout, rows=None):
    into = np.full(layout.size, -7, np.int32)
    table = rotary_table(read_config({**QWEN_V1, "use_dynamic_ntk": False}), 300)
    rows = chosen_rows(batch) if rows is None else np.array(rows, np.int32)
    assert pack(batch, layout, table, into, rows=rows, spare_slot=SPARE, first_row=FIRST_ROW) is None
    return into, {name: layout.part(into, name).tolist() for name in layout.shapes}


def test_a_decode_step_with_padding():
    batch = batch_of([5, LAST_TOKEN, LAST_TOKEN], [4, 0, 7], [1, 1, 1], [9, 64, 3], [[3, UNUSED_PAGE], [8, 2], [5, 0]])
    into, parts = packed(batch, layout := StepLayout(tokens=4, sequences=4, rows=4, max_pages=3))
    assert parts["token_ids"] == [5, 0, 0, 0]
    assert parts["cu_seqlens"] == [0, 1, 2, 3, 4]
    assert parts["past_lengths"] == [9, 64, 3, 0]
    assert parts["rotary_offsets"] == [0] * 4
    assert parts["last_token_ids"] == [0, 1, 2, 3]
    assert parts["slots"] == [4, 0, 7, SPARE]
    assert parts["pages"] == [[3, UNUSED_PAGE, 0], [8, 2, UNUSED_PAGE], [5, 0, 0], [UNUSED_PAGE] * 3]
    # The token ids are gathered from the last tokens by slot, and behind them the packed step.
    table = np.concatenate([10 * np.arange(FIRST_ROW), into])
    assert table[parts["token_rows"]].tolist() == [5, 0, 70, 0]
    assert all(start % 64 == 0 for start in layout.starts.values())


def test_chunks_of_prompts():
    """One chooses, the others go on; a resumed sequence has tokens that the host knows and one that it does not."""
    batch = batch_of(
        [1, 2, 3, 4, 5, LAST_TOKEN], [2, 6, 1], [3, 1, 2], [0, 70, 5], [[1, 0], [2, 3], [4, 0]], [False, True, True]
    )
    _, parts = packed(batch, StepLayout(tokens=6, sequences=3, rows=2, max_pages=2))
    assert parts["cu_seqlens"] == [0, 3, 4, 6]
    assert parts["last_token_ids"] == [3, 5]
    assert parts["slots"] == [6, 1]
    assert parts["token_ids"] == [1, 2, 3, 4, 5, 0]
    assert parts["token_rows"] == [*range(FIRST_ROW, FIRST_ROW + 5), 1]
    _, parts = packed(batch, StepLayout(tokens=6, sequences=3, rows=4, max_pages=2), rows=[0, 1, 4, 5])
    assert parts["slots"] == [2, 2, 1, 1]
    nothing = batch_of([], [], [], [], np.zeros((0, 1)))
    _, parts = packed(nothing, StepLayout(tokens=2, sequences=2, rows=2, max_pages=1))
    assert (parts["cu_seqlens"], parts["last_token_ids"], parts["slots"]) == ([0, 1, 2], [0, 1], [SPARE, SPARE])
    nobody = batch_of([1, 2], [3], [2], [0], [[1]], [False])  # the network computes at least one row
    _, parts = packed(nobody, StepLayout(tokens=2, sequences=1, rows=1, max_pages=1))
    assert (parts["last_token_ids"], parts["slots"]) == ([0], [SPARE])


def test_decode_tokens_with_prompts_behind_them():
    tokens = [LAST_TOKEN, LAST_TOKEN, 1, 2, 3, 4, 5]
    batch = batch_of(tokens, [4, 0, 7, 2], [1, 1, 3, 2], [9, 64, 0, 8], np.ones((4, 2)), [True, True, False, True], 2)
    _, parts = packed(batch, StepLayout(tokens=7, sequences=4, rows=3, max_pages=2, num_decoding=2))
    assert parts["cu_seqlens"] == [0, 1, 2, 5, 7]
    assert parts["prompt_cu_seqlens"] == [0, 3, 5]
    assert parts["last_token_ids"] == [0, 1, 6]
    assert parts["slots"] == [4, 0, 2]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 100, 256, 1024])
def test_sizes_of_decode_steps(most):
    sizes = decode_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 33
    for count in range(1, most + 1):
        assert count <= padded(count, sizes) <= max(2 * count, 8) if count < 16 else count + max(16, count // 4)
