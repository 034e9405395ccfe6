"""Load an engine's folder into a session."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..checkpoints.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from ..common.errors import QwenModelError
from ..common.log import Stopwatch
from ..common.progress import Progress, no_progress
from ..interface.engine_config import EngineConfig
from ..interface.memory import GPU_MEMORY_UTILIZATION
from ..network.rotary import rotary_stretch
from .back_ends import back_end
from .output_folder import ENGINE_FILES, WEIGHT_FILE, WEIGHTS
from .scheduler import Scheduler
from .session import Session

LOG = logging.getLogger(__name__)


def load_engine(
    engine_dir: str | os.PathLike[str],
    *,
    device: str | None = None,
    tuning: bool = True,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    deterministic: bool = False,
    progress: Progress | None = None,
) -> Session:
    """Load an engine on `device` ("cpu", "cuda", "cuda:1"; None: the GPU if there is one), ready to generate.

    tuning: at the first load of such a model on such a GPU, an engine of the torch back end times the GEMM kernels of
        its linear layers, which takes seconds, and keeps the times in the user's cache folder. False: rules choose the
        kernels.
    gpu_memory_utilization: the part of the GPU's memory, above 0 and at most 1, that may be in use when the engine is
        loaded: what is left of it after the weights is the key-value cache's.
    deterministic: what a prompt gives is the same, to the bit, whatever is generated beside it; that costs speed.
    progress: see `Progress`.

    Raises:
        QwenModelError: the folder is not an engine, or one that cannot run here.
    """
    folder = Path(engine_dir)
    before = _version(folder)
    try:
        session = _load(folder, device, tuning, gpu_memory_utilization, deterministic, progress or no_progress)
    except QwenModelError as error:
        if _version(folder) != before:  # the error then comes from the change, not from the engine
            raise _replaced(folder) from error
        raise
    except OSError as error:
        raise QwenModelError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    if _version(folder) != before:
        raise _replaced(folder)
    return session


def _load(
    folder: Path,
    device: str | None,
    tuning: bool,
    gpu_memory_utilization: float,
    deterministic: bool,
    progress: Progress,
) -> Session:
    config = EngineConfig.read(folder)
    _check_readable(folder)
    watch = Stopwatch(LOG)
    LOG.info("%s: %s in %s for the back end %s", folder, config.model.architecture, config.dtype, config.backend)
    engine_back_end = back_end(config.backend)
    watch.lap(f"back end {config.backend} imported")
    loaded = engine_back_end.load_device(
        folder,
        config,
        device,
        tuning,
        progress,
        gpu_memory_utilization=gpu_memory_utilization,
        deterministic=deterministic,
    )
    watch.lap("engine loaded")
    tokenizer = _load_tokenizer(folder)
    watch.lap("tokenizer loaded")
    stretch = partial(rotary_stretch, config.model.rotary)
    return Session(config, Scheduler(loaded, deterministic=deterministic, stretch=stretch), tokenizer)


def _version(folder: Path) -> tuple[int, ...]:
    """Return what changes with each build, which removes config.json first and writes the new one last."""
    try:
        status = (folder / "config.json").stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _replaced(folder: Path) -> QwenModelError:
    return QwenModelError(f"{folder} was replaced while it was being loaded: load it again")


def _check_readable(folder: Path) -> None:
    """Open each file, since some readers report files without permission as missing. Raise OSError."""
    weights = folder / WEIGHTS
    names = [name for name in os.listdir(weights) if WEIGHT_FILE.fullmatch(name)] if weights.is_dir() else []
    for path in (*(folder / name for name in ENGINE_FILES), *(weights / name for name in names)):
        with suppress(FileNotFoundError):
            path.open("rb").close()


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load an engine's tokenizer; None if its checkpoint had none."""
    return load_tokenizer(folder) if has_tokenizer(folder) else None
