"""Divide a model's answer, as it comes, into its reasoning between <think> tags and the answer itself."""

from __future__ import annotations

from dataclasses import dataclass

START, END = "<think>", "</think>"


def held_back(text: str, tags: tuple[str, ...]) -> int:
    """Return how many characters at the end of a text may be the beginning of one of the tags."""
    longest = max(len(tag) for tag in tags) - 1
    for count in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-count:]) for tag in tags):
            return count
    return 0


@dataclass(frozen=True)
class Divided:
    """Hold the texts that a piece adds to the reasoning and to the answer; both may be empty."""

    reasoning: str = ""
    answer: str = ""


class ReasoningParser:
    """Take an answer piece by piece. Without a <think> at its beginning all of it is the answer.

    White space around the reasoning, and between it and the answer, belongs to neither.
    """

    def __init__(self, inside: bool):
        """Take whether the prompt ends with <think>, so that the answer begins with the reasoning."""
        self._phase = "reasoning" if inside else "start"
        self._text = ""  # not given yet
        self._begun = False  # whether a character of the present phase was given

    def push(self, piece: str) -> Divided:
        """Take the next piece; return what is certain now."""
        self._text += piece
        if self._phase == "start":
            self._look_for_start()
        reasoning = self._take_reasoning() if self._phase == "reasoning" else ""
        return Divided(reasoning, self._take_answer() if self._phase == "answer" else "")

    def flush(self) -> Divided:
        """Return what was held back, at the end of the answer: a tag that is not complete is text."""
        text, self._text = self._text, ""
        if self._phase == "reasoning":
            return Divided(reasoning=text.rstrip() if self._begun else text.strip())
        return Divided(answer=text)

    def _look_for_start(self) -> None:
        text = self._text.lstrip()
        if text.startswith(START):
            self._phase, self._text = "reasoning", text[len(START) :]
        elif not START.startswith(text):
            self._phase, self._begun = "answer", True

    def _take_reasoning(self) -> str:
        given, tag, rest = self._text.partition(END)
        if tag:
            self._text, self._phase = rest, "answer"
            reasoning = given.rstrip() if self._begun else given.strip()
            self._begun = False
            return reasoning
        end = len(self._text) - held_back(self._text, (END,))
        return self._give(len(self._text[:end].rstrip()))

    def _take_answer(self) -> str:
        return self._give(len(self._text))

    def _give(self, end: int) -> str:
        given, self._text = self._text[:end], self._text[end:]
        if not self._begun:
            given = given.lstrip()
            self._begun = bool(given)
        return given
