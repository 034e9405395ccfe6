"""Write files whole or not at all, and read users' files: whatever is wrong with one, the error is one clear line."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import QwenModelError, shown

MAX_TEXT_BYTES = 64 << 20
"""The largest file of JSON or text that is read: far more than an index of thousands of shards needs."""
MAX_NESTING = 100
LONGEST_NAME = 160  # characters of a path in a message
MAX_DIGITS = 40  # transformers writes 10^30 for a length without a limit
_LFS_POINTER = b"version https://git-lfs"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its path, then rename it: if anything fails, what was there before stays.

    The target of a symbolic link is written. A file that exists keeps its mode. What is not a regular file, such as
    /dev/null, is written to directly.

    Raises:
        OSError: the file cannot be written, or exists and is read-only.
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
            os.fsync(file.fileno())  # reports a full disk, which closing may not
        if there:
            partial.chmod(path.stat().st_mode & 0o7777)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def cache_folder() -> Path | None:
    """Return the folder of this package in the user's cache folder, which need not exist; None: there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen_model"
    except RuntimeError:  # no home
        return None


def is_file(path: Path) -> bool:
    """Tell whether there is a regular file of that name.

    Raises:
        QwenModelError: this cannot be known: the name is too long, or its folder may not be entered.
    """
    return _has_mode(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder of that name. Raises QwenModelError as `is_file` does."""
    return _has_mode(path, stat.S_ISDIR)


def _has_mode(path: Path, test: Any) -> bool:
    try:
        return bool(test(path.stat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise QwenModelError(f"{_name(path)} cannot be read: {_reason(error)}") from error


def _name(path: Path) -> str:
    """Return the path for a message: cut if it is very long, escaped if it would break the line."""
    text = str(path)
    return text if len(text) <= LONGEST_NAME and text.isprintable() else shown(text)


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def check_readable(path: Path) -> None:
    """Raise QwenModelError if the file cannot be opened, or is a pointer of Git LFS in place of the file."""
    _read_beginning(path, len(_LFS_POINTER))


def _read_beginning(path: Path, max_bytes: int) -> bytes:
    """Read at most `max_bytes` bytes; raise as `check_readable` does."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes)
    except (OSError, ValueError) as error:
        raise QwenModelError(f"{_name(path)} cannot be read: {_reason(error)}") from error
    if content.startswith(_LFS_POINTER):
        raise QwenModelError(
            f"{path} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull, or download it again"
        )
    return content


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without the byte order mark that some editors put first.

    Raises:
        QwenModelError: it cannot be read, is larger than `MAX_TEXT_BYTES`, is not UTF-8, or is a pointer of Git LFS.
    """
    content = _read_beginning(path, MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise QwenModelError(f"{path} is larger than the {MAX_TEXT_BYTES >> 20} MiB that such a file may have")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise QwenModelError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises QwenModelError: see `read_text` and `parse_json_object`."""
    return parse_json_object(read_text(path), str(path))


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a text; `where` names the text in errors.

    Raises:
        QwenModelError: it is not JSON, gives a key two values, is nested deeper than `MAX_NESTING`, has integers
            of more than `MAX_DIGITS` digits, or is not an object.
    """
    try:
        content = json.loads(text, object_pairs_hook=_without_contradiction, parse_int=_short_integer)
    except RecursionError:
        raise QwenModelError(f"{where} is nested deeper than {MAX_NESTING} levels") from None
    except ValueError as error:
        raise QwenModelError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise QwenModelError(f"{where} must hold a JSON object, not {type(content).__name__}")
    _check_nesting(content, where)
    return content


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the members as a dict; a key may come twice, as JSON allows, but not with two values."""
    members = dict(pairs)
    if len(members) < len(pairs):
        for key, value in pairs:
            if members[key] != value:
                raise ValueError(f"the key {shown(key)} has two values")
    return members


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check_nesting(content: dict[str, Any], where: str) -> None:
    level: list[Any] = [content]
    for _ in range(MAX_NESTING):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise QwenModelError(f"{where} is nested deeper than {MAX_NESTING} levels")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
