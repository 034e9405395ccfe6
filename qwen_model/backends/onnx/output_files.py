"""Write an ONNX model and its file of weights, both or neither; only what an export wrote is replaced."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...common.errors import QwenModelError
from ...common.work_folder import NEW, OLD, work_folder
from .graph import PRODUCER

WEIGHTS_SUFFIX = ".data"


def weights_path(model: Path) -> Path:
    """Return where the weights of a model are that does not hold them itself."""
    return model.with_name(model.name + WEIGHTS_SUFFIX)


def output_place(output: str | os.PathLike[str]) -> Path:
    """Return the path of the model to write, symbolic links of folders followed.

    Raises:
        QwenModelError: the name does not end in .onnx, nothing can be written there, or a file there is not of an
            export.
    """
    path = Path(output)
    try:
        if path.suffix != ".onnx":
            raise QwenModelError(f"the output must be a file whose name ends in .onnx, not {path}")
        place = Path(os.path.realpath(path.parent), path.name)
        if not place.parent.is_dir():
            raise QwenModelError(f"{path} cannot be written: there is no folder {path.parent}")
        _check_replaced(place)
        with tempfile.TemporaryFile(dir=place.parent):
            pass
    except QwenModelError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise QwenModelError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return place


def _check_replaced(place: Path) -> None:
    """Raise QwenModelError if a model at `place`, or its weights, would replace a file that no export wrote."""
    for file in (place, weights_path(place)):
        if not _may_be_replaced(file):
            raise QwenModelError(f"{file} already exists and no export wrote it: give another name")


def _may_be_replaced(path: Path) -> bool:
    """Tell whether there is no such file, or it begins as a model with our producer_name or a file of weights does."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return True
    if not stat.S_ISREG(mode):
        return False
    with path.open("rb") as file:
        return PRODUCER.encode() in file.read(2 * len(PRODUCER))


@contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """Yield the path of a new model in a hidden folder; at the end it and its weights, if any, go to `place`.

    Raises:
        QwenModelError: they cannot be written, or another export is writing them. Nothing has changed then.
    """
    try:
        with work_folder(place, inside=False) as work:
            for name in (NEW, OLD):
                (work / name).mkdir()
            new = work / NEW / place.name
            yield new
            _put_in_place(new, place, work / OLD)
    except OSError as error:
        raise QwenModelError(f"{place} cannot be written: {error.strerror or error}") from error


def _put_in_place(new: Path, place: Path, old: Path) -> None:
    """Move what `place` holds to `old`, then the new files to their places: the model first away, and last in."""
    _check_replaced(place)  # again: writing took a while
    pairs = ((new, place), (weights_path(new), weights_path(place)))
    moves = [(there, old / there.name) for _, there in pairs if there.exists()]
    moves += [(here, there) for here, there in reversed(pairs) if here.exists()]
    for here, _ in pairs:
        if here.exists():
            with here.open("rb") as file:
                os.fsync(file.fileno())  # reports a full disk, which closing may not
    done = []
    try:
        for here, there in moves:
            here.rename(there)
            done.append((here, there))
    except BaseException:
        for here, there in reversed(done):
            with suppress(OSError):
                there.rename(here)
        raise
