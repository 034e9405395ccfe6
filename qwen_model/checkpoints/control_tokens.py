"""Puts marks around the control tokens in a user's words, to tell them from those that a template writes.

Only control tokens get marks: what holds none goes through a chat template as it is. The marks are two code points that
Unicode keeps for a program's own use and that are no characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

START, END = "\ufdd0", "\ufdd1"
_ANY_START, _ANY_END = (rf"(?:{mark}|\\u{ord(mark):04x})" for mark in (START, END))  # templates may write JSON in ASCII


def control_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return what matches any of these tokens, the longer first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def contains(value: Any, pattern: re.Pattern[str]) -> bool:
    """Return whether a text among the values, of lists and mappings too, holds a match."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(contains(each, pattern) for item in value.items() for each in item)
    return isinstance(value, Sequence) and any(contains(each, pattern) for each in value)


def mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return the same with marks around every match in its texts; marks that were there before are taken out."""
    if isinstance(value, str):
        return pattern.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
    if isinstance(value, Mapping):
        return {mark(key, pattern) if isinstance(key, str) else key: mark(each, pattern) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [mark(each, pattern) for each in value]
    return value


def split_at_marks(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """Split a text at its marks; return each piece, and whether it is a marked token.

    A template can have parted a token's marks (`split`, slices): a mark alone ends a piece, so that the text on its two
    sides can't join into a token.
    """
    pieces = re.split(f"{_ANY_START}({pattern.pattern}){_ANY_END}|{_ANY_START}|{_ANY_END}", text)
    return [(piece, place % 2 == 1) for place, piece in enumerate(pieces) if piece]
