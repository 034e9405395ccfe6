"""Loading an engine's folder into a session."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoints.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from ..common.errors import QwenModelError
from ..interface.engine_config import EngineConfig
from .back_ends import back_end
from .session import Session


def load_engine(engine_dir: str | os.PathLike[str], *, device: str | None = None) -> Session:
    """Load an engine on `device` ("cpu", "cuda", "cuda:1"; None: the GPU if there is one), ready to generate."""
    folder = Path(engine_dir)
    config = EngineConfig.read(folder)
    before = folder.stat()
    executor = back_end(config.backend).load_executor(folder, config, device)
    tokenizer = _load_tokenizer(folder)
    if not folder.is_dir() or not os.path.samestat(before, folder.stat()):
        raise QwenModelError(f"{folder} was replaced while it was being loaded: load it again")
    return Session(config, executor, tokenizer)


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of an engine; None if its checkpoint had none."""
    return load_tokenizer(folder) if has_tokenizer(folder) else None
