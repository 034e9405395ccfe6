"""Read typed values of a JSON object, with errors that name the key, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..common.errors import QwenModelError, shown

LARGEST_INTEGER = 2**31 - 1  # what a tensor's dimension and the kernels' arguments can be
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-12, 1e12  # beyond every real setting, and within what float32 can hold


def is_integer(value: Any, least: int = 1) -> bool:
    """Tell whether `value` is an integer from `least` to `LARGEST_INTEGER`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST_INTEGER


def is_number(value: Any) -> bool:
    """Tell whether `value` is a number from `SMALLEST_NUMBER` to `LARGEST_NUMBER`."""
    right_type = isinstance(value, (int, float)) and not isinstance(value, bool)
    return right_type and SMALLEST_NUMBER <= value <= LARGEST_NUMBER


class JsonValues:
    """Read the settings of one JSON object. A key that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        """Read from `values`; errors name `where` as their place. All methods raise QwenModelError for wrong values."""
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Tell whether the key exists and is not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return an integer from `least` to `LARGEST_INTEGER`; without a default it must exist."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise QwenModelError(f"{self.where} has no {key!r}")
        if not is_integer(value, least):
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise QwenModelError(f"{self.where}: {key} must be {kind}, below 2^31, not {shown(value)}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number from `SMALLEST_NUMBER` to `LARGEST_NUMBER`."""
        value = self.values.get(key)
        if value is None:
            return default
        if not is_number(value):
            raise QwenModelError(
                f"{self.where}: {key} must be a number from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g}, not "
                f"{shown(value)}"
            )
        return float(value)

    def boolean(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise QwenModelError(f"{self.where}: {key} must be true or false, not {shown(value)}")
        return value

    def nested(self, key: str) -> JsonValues:
        """Return the object of that name; an empty one if it is missing."""
        value = self.values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise QwenModelError(f"{self.where}: {key} must be an object, not {shown(value)}")
        return JsonValues(value, f"{self.where}: {key}")
