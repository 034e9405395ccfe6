"""An engine's folder: checked before the work, written beside its place, and renamed when whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..checkpoints.tokenizer import TOKENIZER_FILES
from ..common.errors import QwenModelError
from ..interface.engine_config import read_engine_json

ENGINE_FILES = {"config.json", "weights", "model.plan", *TOKENIZER_FILES}


def check_target(target: Path, source: Path) -> None:
    """Nothing that is not ours is replaced, and a folder that cannot be written is found before the work."""
    if source.resolve().is_relative_to(target.resolve()):
        raise QwenModelError(f"{target} holds the checkpoint {source}: give another folder")
    if target.exists() and not target.is_dir():
        raise QwenModelError(f"{target} is there already and is not a folder")
    if target.is_dir() and any(target.iterdir()) and read_engine_json(target) is None:
        raise QwenModelError(f"{target} is there already and is not an engine; give an empty or a new folder")
    others = sorted({path.name for path in target.iterdir()} - ENGINE_FILES) if target.is_dir() else []
    if others:
        raise QwenModelError(f"{target} has more in it than an engine ({', '.join(others[:5])}): give another folder")
    parent = next(folder for folder in target.parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise QwenModelError(f"{target} cannot be written: no permission to write in {parent}")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end; on any error nothing of it is left."""
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise QwenModelError(f"{target} cannot be written: {error.strerror}") from error
    try:
        yield folder
        _open_as_usual(folder)
        _put_in_place(folder, target)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(error, OSError):
            raise QwenModelError(f"{target} cannot be written: {error}") from error
        raise


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; if that fails, what was there before is back."""
    if not target.exists():
        folder.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(aside / "engine")
        folder.rename(target)
    finally:
        if not target.exists():
            (aside / "engine").rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _open_as_usual(folder: Path) -> None:
    """Give all of it the modes of new files: temporary folders and safetensors' files are their owner's alone."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
