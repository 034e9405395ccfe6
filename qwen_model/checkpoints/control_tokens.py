"""Mark the control tokens in a user's messages, to tell them from those that a chat template writes.

Only control tokens are marked: text without any goes through the template unchanged. The marks are two code points that
Unicode reserves as noncharacters for internal use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

START, END = "\ufdd0", "\ufdd1"
_ANY_START, _ANY_END = (rf"(?:{mark}|\\u{ord(mark):04x})" for mark in (START, END))  # templates may write JSON in ASCII


def control_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern for any of these tokens, longer ones first; without tokens it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def contains(value: Any, pattern: re.Pattern[str]) -> bool:
    """Tell whether a string in `value`, which may hold lists and mappings, contains a match."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(contains(each, pattern) for item in value.items() for each in item)
    return isinstance(value, Sequence) and any(contains(each, pattern) for each in value)


def mark(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return `value` with marks around every match in its strings; marks that it had before are removed."""
    if isinstance(value, str):
        return pattern.sub(f"{START}\\g<0>{END}", value.replace(START, "").replace(END, ""))
    if isinstance(value, Mapping):
        return {mark(key, pattern) if isinstance(key, str) else key: mark(each, pattern) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [mark(each, pattern) for each in value]
    return value


def split_at_marks(text: str, pattern: re.Pattern[str]) -> list[tuple[str, bool]]:
    """Split a text at its marks; return each piece, and whether it is a marked token.

    A template may have separated the marks of a token (`split`, slices): a single mark also ends a piece, so that the
    text on its two sides cannot become a token.
    """
    pieces = re.split(f"{_ANY_START}({pattern.pattern}){_ANY_END}|{_ANY_START}|{_ANY_END}", text)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]
