"""Read data sets of JSON objects: a JSON list, or JSON Lines; ShareGPT's is 670 MB."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import QwenModelError
from ..common.files import check_readable, is_file


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, and how many entries were left out because they are not JSON objects.

    Raises:
        QwenModelError: the file cannot be read, or has no object.
    """
    if not is_file(path):
        raise QwenModelError(f"{path} is not a file: expected a JSON list of objects, or an object on each line")
    check_readable(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            beginning = file.read(1024).lstrip()
            file.seek(0)
            entries = json.load(file) if beginning.startswith("[") else list(_lines(file))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise QwenModelError(f"{path} is not a JSON list, or not UTF-8: {error}") from error
    objects = [entry for entry in entries if isinstance(entry, dict)]
    if not objects:
        raise QwenModelError(f"{path} has no JSON objects: expected a list of them, or one on each line")
    return objects, len(entries) - len(objects)


def _lines(file: Iterator[str]) -> Iterator[Any]:
    """Yield the value of each line that is not blank; None for a line that is not JSON."""
    for line in file:
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                yield None


def is_unicode(text: str) -> bool:
    """Tell whether a string of a JSON file is valid Unicode: escapes can make half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
