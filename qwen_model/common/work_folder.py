"""Make the hidden folder that a command writes its output in, with a lock file that the process holds locked.

So a second command for the same place finds the first one running, and a later one removes what a killed one left.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import QwenModelError

INSIDE = ".engine.building"  # its name inside a folder that is written; then the names in it
LOCK, NEW, OLD = "lock", "new", "old"


@contextmanager
def work_folder(place: Path, inside: bool) -> Iterator[Path]:
    """Make a folder inside the folder `place` or beside it, and remove it with its content at the end.

    place: the folder, or the file, that is written. inside: of a folder alone.

    Raises:
        QwenModelError: another command is writing there, or may be, on another machine.
        OSError: the folder cannot be made.
    """
    work, other = place / INSIDE, place.parent / _name_beside(place)
    if not inside:
        work, other = other, work
    _remove_left_over(work, place)
    with _new_and_locked(work, place) as lock:
        try:
            json.dump(_this_process(), lock)
            lock.flush()
            # After making its own folder: of two commands that start at once, each then finds the other's.
            _remove_left_over(other, place)
            yield work
        finally:
            _remove(work)
    _remove_empty(work)


def has_work(place: Path) -> bool:
    """Tell whether a command is writing inside the folder, or was killed while it did."""
    return (place / INSIDE / LOCK).is_file()


def _name_beside(place: Path) -> str:
    """Return a name that is different for each place and has at most 255 bytes."""
    return f".{place.name[:50]}.{zlib.crc32(os.fsencode(place.name)):08x}.building"


def _new_and_locked(work: Path, place: Path) -> IO[str]:
    """Make the folder and the lock file in it; return the locked file."""
    try:
        work.mkdir(mode=0o700)
        lock = (work / LOCK).open("x", encoding="utf-8")
    except (FileExistsError, FileNotFoundError):  # another command was faster, or removed the folder as left over
        raise _another_command(place) from None
    except OSError:
        _remove_empty(work)
        raise
    with suppress(OSError):  # on a file system without locks nothing of a killed command is removed either
        fcntl.flock(lock, fcntl.LOCK_EX)
    if not _is_lock_of(work, lock):
        lock.close()
        raise _another_command(place)
    return lock


def _is_lock_of(work: Path, lock: IO[str]) -> bool:
    """Tell whether this is still the lock file: before it was locked the folder may have been removed and remade."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (work / LOCK).stat())
    except FileNotFoundError:
        return False


def _remove_left_over(work: Path, place: Path) -> None:
    """Remove what a killed command left; raise QwenModelError if one is running, or may be on another machine."""
    if not os.path.lexists(work):
        return
    unknown = f"{work} may be of a run on another machine: if none runs, remove it; else wait, or give another place"
    try:
        if work.is_symlink() or not set(os.listdir(work)) <= {LOCK, NEW, OLD}:
            raise QwenModelError(f"{work} is in the way, and not of a run: rename it, or give another place")
        with (work / LOCK).open("r+", encoding="utf-8") as lock:
            owner = _owner(lock.read())
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _another_command(place, owner) from None
            if not _is_lock_of(work, lock):
                raise _another_command(place)
            if os.listdir(work) != [LOCK] and not _of_this_machine(owner):
                raise QwenModelError(unknown)
            _remove(work)
    except FileNotFoundError:  # it was killed before it made the lock file
        pass
    except OSError as error:  # the file system has no locks, or the file is another user's
        raise QwenModelError(f"{unknown} ({error.strerror})") from error
    _remove_empty(work)


def _this_process() -> dict[str, str]:
    """Describe this process, for the lock file."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {"host": platform.node(), "boot": boot, "process": str(os.getpid())}


def _owner(text: str) -> dict[str, Any]:
    """Read which process wrote the lock file; the result is empty if that is not written yet."""
    try:
        owner = json.loads(text)
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}


def _of_this_machine(owner: dict[str, Any]) -> bool:
    """Tell whether the owner of the lock is on this machine; locks of other machines are not always visible.

    Containers have host names of their own but share the boot id of their machine.
    """
    here = _this_process()
    return any(here[key] and owner.get(key) == here[key] for key in ("host", "boot"))


def _another_command(place: Path, owner: dict[str, Any] | None = None) -> QwenModelError:
    who = f" (process {owner.get('process')} on {owner.get('host')})" if owner else ""
    return QwenModelError(f"another command{who} is writing {place}: wait until it ends, or give another place")


def _remove(work: Path) -> None:
    """Remove all, the lock file last, so that what an interruption leaves is still recognised as a command's."""
    for name in (NEW, OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    with suppress(OSError):
        if os.listdir(work) == [LOCK]:
            (work / LOCK).unlink()
    _remove_empty(work)


def _remove_empty(work: Path) -> None:
    """Remove the folder if it is empty; on NFS the lock file disappears only when it is closed."""
    with suppress(OSError):
        work.rmdir()
