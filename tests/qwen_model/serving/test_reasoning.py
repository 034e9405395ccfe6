"""Test how answers are divided into reasoning and answer, whole and cut into pieces at every place."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_model.serving.reasoning import ReasoningParser

ANSWERS = {
    "none": ("Hello <b>.", False, "", "Hello <b>."),
    "both": ("<think>\nLet me see.\n\nYes.\n</think>\n\nIt is 4.\n", False, "Let me see.\n\nYes.", "It is 4.\n"),
    "empty": ("<think>\n\n</think>\n\n4", False, "", "4"),
    "opened by the prompt": ("\nLet me see.\n</think>\n\n4", True, "Let me see.", "4"),
    "not closed": ("<think>\nLet me see </thin", False, "Let me see </thin", ""),
    "later": ("a <think> b </think>", False, "", "a <think> b </think>"),
    "half a tag": ("<thin", False, "", "<thin"),
}


def parse(pieces: list[str], inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(inside)
    found = [parser.push(piece) for piece in pieces] + [parser.flush()]
    return "".join(each.reasoning for each in found), "".join(each.answer for each in found)


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_whole_and_in_single_characters(name: str) -> None:
    text, inside, reasoning, answer = ANSWERS[name]
    assert parse([text], inside) == (reasoning, answer)
    assert parse(list(text), inside) == (reasoning, answer)


@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(0, 60), max_size=5))
def test_answers_cut_anywhere(name: str, places: list[int]) -> None:
    text, inside, reasoning, answer = ANSWERS[name]
    cuts = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    assert parse([text[start:end] for start, end in pairwise(cuts)], inside) == (reasoning, answer)
