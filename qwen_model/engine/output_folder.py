"""Write an engine to the folder that the user named: check it first, build in a hidden folder, move when complete.

The hidden folder is beside the engine's folder, so that one rename makes a new engine and one exchange replaces an old
one. If the engine's folder itself has to stay (see `_stays`), the hidden folder is inside, and files are moved one by
one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoints.tokenizer import TOKENIZER_FILES
from ..common.errors import QwenModelError
from ..common.work_folder import INSIDE, NEW, OLD, has_work, work_folder
from ..interface.engine_config import read_engine_json

CONFIG, WEIGHTS = "config.json", "weights"
ENGINE_FILES = {CONFIG, "model.plan", *TOKENIZER_FILES}
WEIGHT_FILE = re.compile(r"(embedding|layer_\d{3,}|output)\.safetensors")
NOT_COUNTED = {INSIDE, "lost+found"}  # the latter is at the top of every ext4 volume


def output_place(output_dir: str | os.PathLike[str], source: Path) -> Path:
    """Return the folder that `output_dir` leads to, symbolic links followed, for an engine of the checkpoint `source`.

    Raises:
        QwenModelError: it cannot be written, or already exists and is not an engine and nothing else.
    """
    place = _real_place(output_dir)
    try:
        if _is_folder(place):
            _check_contents(place, source)
            folders = [place, place / WEIGHTS] if (place / WEIGHTS).is_dir() else [place]
        else:
            folders = [next(folder for folder in place.parents if folder.exists())]
            if not folders[0].is_dir():
                raise QwenModelError(f"{place} cannot be written: {folders[0]} is a file, not a folder")
        for folder in folders:
            _check_writable(folder, place)
    except OSError as error:
        raise _not_written(place, error) from error
    return place


def _real_place(output_dir: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.path.realpath(output_dir))
    except (OSError, ValueError) as error:  # the current folder is gone; a zero byte in the name
        raise QwenModelError(f"{os.fspath(output_dir)!r} is no folder that can be written: {error}") from error


@contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `place` (see `output_place`) at the end; on any error nothing of it is left.

    Raises:
        QwenModelError: `place` cannot be written, or another command is writing it.
    """
    with _parents_made(place):
        is_there = _is_folder(place)
        before = _contents(place)[0] if is_there else []
        with work_folder(place, inside=is_there and _stays(place)) as work:
            new = work / NEW
            new.mkdir()
            yield new
            _finish(new)
            _put_in_place(new, place, work / OLD, before)


def new_folder_place(output_dir: str | os.PathLike[str]) -> Path:
    """Return the folder that `output_dir` leads to, symbolic links followed, which must be new or empty.

    Raises:
        QwenModelError: it cannot be written, or already exists with something in it.
    """
    place = _real_place(output_dir)
    try:
        if _is_folder(place) and any(place.iterdir()):
            raise QwenModelError(f"{place} already exists and is not empty: give a new folder")
        parent = next(folder for folder in place.parents if folder.exists())
        if not parent.is_dir():
            raise QwenModelError(f"{place} cannot be written: {parent} is a file, not a folder")
        _check_writable(parent, place)
    except OSError as error:
        raise _not_written(place, error) from error
    return place


@contextmanager
def new_folder_written_whole(place: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `place` (see `new_folder_place`) at the end; on any error nothing of it is left.

    Raises:
        QwenModelError: `place` cannot be written, is no longer empty, or another process is writing it.
    """
    with _parents_made(place), work_folder(place, inside=False) as work:
        new = work / NEW
        new.mkdir()
        yield new
        _flush(new)
        new.rename(place)  # replaces an empty folder, and no other


@contextmanager
def _parents_made(place: Path) -> Iterator[None]:
    """Make the folders that `place` is in, and remove those again on any error; an OSError becomes a QwenModelError."""
    made = [folder for folder in (place.parent, *place.parent.parents) if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise _not_written(place, error) from error
        raise


def _not_written(place: Path, error: OSError) -> QwenModelError:
    """Return the error for `place`, with the file at fault, which may be one of the checkpoint."""
    name = error.filename2 or error.filename
    where = f" ({os.fsdecode(name)})" if name not in (None, str(place)) else ""
    return QwenModelError(f"{place} cannot be written: {error.strerror or error}{where}")


def _is_folder(place: Path) -> bool:
    """Tell whether the folder exists; raise QwenModelError if it is not a folder, OSError if this cannot be known."""
    try:
        mode = place.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISDIR(mode):
        raise QwenModelError(f"{place} already exists and is not a folder")
    return True


def _check_writable(folder: Path, place: Path) -> None:
    """Make a temporary file, since `os.access` does not know every reason why that can fail."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise QwenModelError(f"{place} cannot be written: {error.strerror} in {folder}") from error


def _check_contents(place: Path, source: Path) -> None:
    """Raise QwenModelError if an engine in this folder would replace anything that no build wrote."""
    if source.resolve().is_relative_to(place):
        raise QwenModelError(f"{place} holds the checkpoint {source}: give another folder")
    names = set(os.listdir(place))
    killed_moving = has_work(place) and CONFIG not in names  # a build that was killed while it moved its files
    if names - NOT_COUNTED and not killed_moving and read_engine_json(place) is None:
        raise _not_an_engine(place)
    others = [name for name in _contents(place)[1] if name not in NOT_COUNTED]
    if others:
        raise QwenModelError(
            f"{place} holds files that are not of an engine ({', '.join(others[:5])}): give another folder"
        )


def _not_an_engine(place: Path) -> QwenModelError:
    return QwenModelError(f"{place} already exists and is not an engine; give an empty or a new folder")


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """List an engine's files in a folder, and everything that no build wrote, as relative paths."""
    files: list[str] = []
    others: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name == WEIGHTS and entry.is_dir(follow_symlinks=False):
            for inner in sorted(os.scandir(entry), key=lambda inner: inner.name):
                ours = WEIGHT_FILE.fullmatch(inner.name) and inner.is_file(follow_symlinks=False)
                (files if ours else others).append(f"{WEIGHTS}/{inner.name}")
        else:
            ours = entry.name in ENGINE_FILES and entry.is_file(follow_symlinks=False)
            (files if ours else others).append(entry.name)
    return files, others


def _stays(place: Path) -> bool:
    """Tell whether the folder must be filled and cannot be exchanged for another.

    That is true of an empty folder, of the current folder, and of one into which nothing can be moved from its parent:
    a mount point, or a folder whose parent cannot be written.
    """
    if not set(os.listdir(place)) - NOT_COUNTED:
        return True
    with suppress(FileNotFoundError):  # the current folder was deleted
        if Path.cwd().is_relative_to(place):
            return True
    try:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".engine.") as beside:
            probe = Path(beside, "probe")
            probe.touch()
            probe.rename(place / Path(beside).name).unlink()
    except OSError:
        return True
    return False


def _finish(folder: Path) -> None:
    """Flush all files to the disk, having checked that they are known as those of an engine."""
    unknown = _contents(folder)[1]
    if unknown:
        raise RuntimeError(f"the next build would take these files for a user's: {unknown}; name them in this module")
    _flush(folder)


def _flush(folder: Path) -> None:
    """Flush all files to the disk and give them the modes of new files; safetensors makes files private."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # reports a full disk, which closing may not
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put_in_place(new: Path, place: Path, old: Path, before: list[str]) -> None:
    """Rename, exchange or move `new` to `place`; what it replaces is moved to `old`. On an error all is as before.

    before: the files of an engine that `place` held when the build began. Others may have come meanwhile.
    """
    if not _is_folder(place):
        new.rename(place)
        return
    files, others = _contents(place)
    if set(files) - set(before) and read_engine_json(place) is None:
        raise _not_an_engine(place)
    shutil.copymode(place, new)
    if others or not _exchange(new, place):
        _move_files(new, place, files, old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False if the system, the file system or the place does not allow it."""
    current_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # not every C library has it
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    done: int = renameat2(current_folder, os.fsencode(one), current_folder, os.fsencode(other), rename_exchange)
    return done == 0


def _move_files(new: Path, place: Path, files: list[str], old: Path) -> None:
    """Move `files` from `place` to `old`, config.json first, then the files of `new` to `place`, config.json last.

    Without config.json a folder is not an engine.
    """
    moves = [(place / name, old / name) for name in sorted(files, key=lambda name: name != CONFIG)]
    moves += [(new / name, place / name) for name in sorted(_contents(new)[0], key=lambda name: name == CONFIG)]
    try:
        for here, there in moves:
            there.parent.mkdir(parents=True, exist_ok=True)
            here.rename(there)
    except BaseException:
        for here, there in reversed(moves):
            if there.exists() and not here.exists():
                there.rename(here)
        raise
    finally:
        with suppress(OSError):  # left of an engine of the other back end
            (place / WEIGHTS).rmdir()
