"""Typed reading of a JSON object: every error names the key, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.errors import QwenModelError, shown

LARGEST_INTEGER = 2**31 - 1  # what a tensor's dimension and the kernels' arguments can be
LARGEST_NUMBER = 1e12  # beyond every real setting, and far from what float32 can hold


class JsonValues:
    """The settings of one JSON object. A key that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        """Read from `values`; errors say that they are in `where`."""
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Whether it is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` to `LARGEST_INTEGER`; without a default it must be there."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise QwenModelError(f"{self.where} has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise QwenModelError(f"{self.where}: {key} must be {kind}, not {shown(value)}")
        if value > LARGEST_INTEGER:
            raise QwenModelError(f"{self.where}: {key} {shown(value)} is too large: at most {LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number of at most `LARGEST_NUMBER`."""
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LARGEST_NUMBER:
            raise QwenModelError(
                f"{self.where}: {key} must be a positive number of at most {LARGEST_NUMBER:g}, not {shown(value)}"
            )
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise QwenModelError(f"{self.where}: {key} must be true or false, not {shown(value)}")
        return value

    def nested(self, key: str) -> JsonValues:
        """The object of that name; an empty one if it is missing."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise QwenModelError(f"{self.where}: {key} must be an object, not {shown(value)}")
        return JsonValues(value, f"{self.where}: {key}")
