"""Makes the hidden folder that a build writes in: its own while it lives, and known for a build's when it is dead.

The building process holds a lock on a file in it. So a second build for the same place finds the first, and the next
one removes what a build left that was killed.
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

from ..common.errors import QwenModelError

INSIDE = ".engine.building"  # its name inside an engine's folder, and what is in it:
LOCK, NEW, OLD = "lock", "new", "old"


@contextmanager
def work_folder(place: Path, inside: bool) -> Iterator[Path]:
    """Make a folder inside the engine's or beside it, and remove it at the end with all that is in it.

    Raises:
        QwenModelError: another build is writing an engine there, or may be, on another machine.
        OSError: it cannot be made.
    """
    work, other = place / INSIDE, place.parent / _name_beside(place)
    if not inside:
        work, other = other, work
    _remove_dead(work, place)
    with _new_and_locked(work, place) as lock:
        try:
            json.dump(_this_process(), lock)
            lock.flush()
            _remove_dead(other, place)  # only now: of two builds that begin at once, each has made what the other finds
            yield work
        finally:
            _remove(work)
    _remove_empty(work)


def has_work(place: Path) -> bool:
    """Tell whether a build is writing inside the folder, or was killed when it did."""
    return (place / INSIDE / LOCK).is_file()


def _name_beside(place: Path) -> str:
    """Give each place a name of its own, of at most 255 bytes."""
    return f".{place.name[:50]}.{zlib.crc32(os.fsencode(place.name)):08x}.building"


def _new_and_locked(work: Path, place: Path) -> IO[str]:
    """Make the folder, and the lock in it."""
    try:
        work.mkdir(mode=0o700)
        lock = (work / LOCK).open("x", encoding="utf-8")
    except (FileExistsError, FileNotFoundError):  # another build was quicker, or took it for a dead one's
        raise _another_build(place) from None
    except OSError:
        _remove_empty(work)
        raise
    with suppress(OSError):  # a file system without locks: there nothing of a dead build is removed either
        fcntl.flock(lock, fcntl.LOCK_EX)
    if not _is_lock_of(work, lock):
        lock.close()
        raise _another_build(place)
    return lock


def _is_lock_of(work: Path, lock: IO[str]) -> bool:
    """Tell whether it is still there: the folder may have been removed, and made anew, before the lock was ours."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), (work / LOCK).stat())
    except FileNotFoundError:
        return False


def _remove_dead(work: Path, place: Path) -> None:
    """Remove what a dead build left; a living one, or what may be one on another machine, is an error."""
    if not os.path.lexists(work):
        return
    unknown = (
        f"{work} may be of a build that runs elsewhere: if none does, remove it; else wait, or give another folder"
    )
    try:
        if work.is_symlink() or not set(os.listdir(work)) <= {LOCK, NEW, OLD}:
            raise QwenModelError(f"{work} is in the way, and no build made it: rename it, or give another folder")
        with (work / LOCK).open("r+", encoding="utf-8") as lock:
            maker = _maker(lock.read())
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _another_build(place, maker) from None
            if not _is_lock_of(work, lock):
                raise _another_build(place)
            if os.listdir(work) != [LOCK] and not _of_this_machine(maker):
                raise QwenModelError(unknown)
            _remove(work)
    except FileNotFoundError:  # it died before it had a lock
        pass
    except OSError as error:  # no locks on this file system, or another user's
        raise QwenModelError(f"{unknown} ({error.strerror})") from error
    _remove_empty(work)


def _this_process() -> dict[str, str]:
    """Describe this process, for the lock."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return {"host": platform.node(), "boot": boot, "process": str(os.getpid())}


def _maker(text: str) -> dict[str, Any]:
    """Read who wrote the lock; it is empty if that is not written yet."""
    try:
        maker = json.loads(text)
    except ValueError:
        maker = None
    return maker if isinstance(maker, dict) else {}


def _of_this_machine(maker: dict[str, Any]) -> bool:
    """Tell whether its lock can be trusted: over a network the locks of other machines are not always seen.

    Containers have names of their own, and the boot id of their machine in common.
    """
    here = _this_process()
    return any(here[key] and maker.get(key) == here[key] for key in ("host", "boot"))


def _another_build(place: Path, maker: dict[str, Any] | None = None) -> QwenModelError:
    who = f" (process {maker.get('process')} on {maker.get('host')})" if maker else ""
    return QwenModelError(f"another build{who} is writing {place}: wait until it has ended, or give another folder")


def _remove(work: Path) -> None:
    """Remove all, the lock last: what is left when this is interrupted is still known as a build's."""
    for name in (NEW, OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    with suppress(OSError):
        if os.listdir(work) == [LOCK]:
            (work / LOCK).unlink()
    _remove_empty(work)


def _remove_empty(work: Path) -> None:
    """Remove the folder if nothing is in it; on NFS the lock goes when it is closed."""
    with suppress(OSError):
        work.rmdir()
