"""Files that are there whole or not at all, and files that hold one JSON object."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import QwenModelError


def write_whole(path: Path, content: bytes) -> None:
    """Write beside its place, then rename: whatever goes wrong, what was there before stays. Raises OSError.

    A symbolic link stays, and the file it points to is written. A file keeps its mode, and is left alone where it may
    not be written. What is no regular file, like /dev/null, is written as it is.
    """
    path = Path(os.path.realpath(path))
    there = path.exists()
    if there and not path.is_file():
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name[:50]}.{os.urandom(4).hex()}")
    try:
        if there:
            path.open("r+b").close()
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # which tells of a full disk where closing does not
        if there:
            partial.chmod(path.stat().st_mode & 0o7777)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def read_json_object(path: Path) -> dict[str, Any]:
    """What is in it. QwenModelError: it is not JSON, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QwenModelError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise QwenModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise QwenModelError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
