"""Building an engine from a checkpoint, and loading it.

An engine is a folder: `config.json` (see engine_config.py), the tokenizer's files, and of the torch back end `weights/`
with one safetensors file for the embedding, one for each layer and one for the output, of the TensorRT back end
`model.plan`. It is written beside its place and renamed when whole.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import DTYPES, ModelConfig
from .engine_config import BACKENDS, EngineConfig, Limits, read_engine_json
from .errors import QwenModelError
from .extras import import_extra, require_kernels
from .files import read_json_object
from .memory import required_bytes
from .session import Session
from .tokenizer import QWEN_TIKTOKEN, TOKENIZER_FILES, TOKENIZER_JSON, Tokenizer, copy_tokenizer_files, load_tokenizer
from .weights import Checkpoint, Framework, weight_groups

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("weights", "TensorRT", "plan"), and the bytes done and in all (0: not known)."""


ENGINE_FILES = {"config.json", "weights", "model.plan", *TOKENIZER_FILES}
FRAMEWORKS: dict[str, Framework] = {"torch": "torch", "tensorrt": "numpy"}
MODULES = {
    "torch": ("torch", "safetensors"),
    "tensorrt": ("tensorrt", "cuda.bindings", "safetensors", "ml_dtypes"),
}
"""What each back end needs; the extra of the package that has its name brings it."""


@dataclass(frozen=True)
class BuildSummary:
    """What `build_engine` made."""

    engine_dir: Path
    config: EngineConfig
    weight_bytes: int
    cache_bytes: int
    seconds: float
    warnings: tuple[str, ...]


def build_engine(
    model_dir: str | os.PathLike[str] | None = None,
    *,
    output_dir: str | os.PathLike[str],
    backend: str = "torch",
    dtype: str | None = None,
    rmsnorm_plugin: bool = False,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    rotary_scaling: Mapping[str, Any] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """Make an engine in `output_dir` from a Hugging Face checkpoint (None: the model in this package).

    backend: "torch" or "tensorrt". A TensorRT engine is built where it is to run: for that GPU and TensorRT.
    dtype: "float16", "bfloat16" or "float32"; None: the checkpoint's where there is a GPU, else "float32".
    rmsnorm_plugin: normalise with this project's RMSNorm rather than with the back end's own operations.
    rotary_scaling: as `rope_scaling` in a `config.json`, in its place.
    timing_cache: file with what TensorRT's builder measured, read and written; None: one in the user's cache folder.
    progress: see `Progress`.

    An engine that is in `output_dir` already is replaced; a folder with anything else in it is an error.
    """
    start = time.perf_counter()
    _check_choice("backend", backend, BACKENDS)
    if dtype is not None:
        _check_choice("dtype", dtype, DTYPES)
    if timing_cache is not None and backend != "tensorrt":
        raise QwenModelError(f"timing_cache (--timing-cache) is for the back end tensorrt, not for {backend}")
    source = _model_dir(model_dir)
    target = Path(output_dir).absolute()
    _check_target(target, source)
    model = ModelConfig.from_model_dir(source)
    if rotary_scaling is not None:
        model = model.with_rotary_scaling(rotary_scaling)
    limits = _limits(model, max_batch_size, max_input_len, max_output_len)
    groups = weight_groups(model)
    back_end = _back_end(backend)
    checkpoint = Checkpoint(source, FRAMEWORKS[backend])
    checkpoint.check(groups, model.tied_embedding)
    tokenizer_warnings = _check_tokenizer(source)

    config = EngineConfig(
        backend=backend,
        dtype=dtype or back_end.default_dtype(model.dtype),
        rmsnorm_plugin=rmsnorm_plugin,
        limits=limits,
        model=model,
        end_token_ids=read_end_token_ids(source),
        num_parameters=sum(math.prod(spec.shape) for group in groups for spec in group.specs),
        versions={"qwen_model": _package_version(), "python": platform.python_version(), **back_end.versions()},
    )
    weight_bytes, cache_bytes = required_bytes(model, limits, config.dtype)
    warnings = [*tokenizer_warnings, *_warnings(model, limits, config.dtype if dtype is None else None)]
    report = progress or (lambda phase, done, total: None)
    options = {} if timing_cache is None else {"timing_cache": Path(timing_cache)}
    with _written_whole(target) as folder:
        warnings += back_end.write_engine(folder, config, checkpoint.read, report, **options)
        copy_tokenizer_files(source, folder)
        config.write(folder)
    seconds = time.perf_counter() - start
    return BuildSummary(target, config, weight_bytes, cache_bytes, seconds, tuple(warnings))


def load_engine(engine_dir: str | os.PathLike[str], *, device: str | None = None) -> Session:
    """Load an engine on `device` ("cpu", "cuda", "cuda:1"; None: the GPU if there is one), ready to generate."""
    folder = Path(engine_dir)
    config = EngineConfig.read(folder)
    before = folder.stat()
    executor = _back_end(config.backend).load_executor(folder, config, device)
    tokenizer = _load_tokenizer(folder)
    if not folder.is_dir() or not os.path.samestat(before, folder.stat()):
        raise QwenModelError(f"{folder} was replaced while it was being loaded: load it again")
    return Session(config, executor, tokenizer)


def _back_end(name: str) -> ModuleType:
    for module in MODULES[name]:
        import_extra(module, f"the {name} back end", extra=name)
    if name == "tensorrt":
        require_kernels()
    return importlib.import_module(f"qwen_model.backends.{name}")


def read_end_token_ids(model_dir: Path) -> tuple[int, ...]:
    """Every end token that `generation_config.json` names, else those of `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        ids = read_json_object(path).get("eos_token_id")
        if ids is not None and ids != []:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
                raise QwenModelError(f"{path}: eos_token_id must be one or several integers, not {ids!r}")
            return tuple(ids)
    return ()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise QwenModelError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _model_dir(model_dir: str | os.PathLike[str] | None) -> Path:
    if model_dir is None:
        from .packaged_model import packaged_model_dir

        return packaged_model_dir()
    path = Path(model_dir)
    if not path.is_dir():
        raise QwenModelError(f"{path} is not a folder; --model-dir takes the folder of a Hugging Face checkpoint")
    return path


def _check_target(target: Path, source: Path) -> None:
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


def _limits(
    model: ModelConfig, max_batch_size: int | None, max_input_len: int | None, max_output_len: int | None
) -> Limits:
    """What was asked for; what was not is the default, but no more than the model was made for."""
    asked = {"max_batch_size": max_batch_size, "max_input_len": max_input_len, "max_output_len": max_output_len}
    limits = dataclasses.replace(Limits(), **{name: value for name, value in asked.items() if value is not None})
    room = usable_positions(model)
    if max_input_len is None:
        inputs = room * 2 // 3 if max_output_len is None else room - max_output_len
        limits = _at_most(limits, "max_input_len", inputs, f"{limits.max_output_len} tokens of output", room)
    if max_output_len is None:
        outputs = room - limits.max_input_len
        limits = _at_most(limits, "max_output_len", outputs, f"prompts of {limits.max_input_len} tokens", room)
    return limits


def _at_most(limits: Limits, name: str, left: int, taken_by: str, room: int) -> Limits:
    """`limits` with no more than the tokens that are left for `name`; an error that names the flags if none are."""
    if left < 1:
        raise QwenModelError(
            f"{taken_by} leave none of the model's {room} for {name}: give smaller ones, or both --max-input-len and "
            "--max-output-len, or a --rotary-scaling"
        )
    return dataclasses.replace(limits, **{name: min(getattr(limits, name), left)})


def usable_positions(model: ModelConfig) -> int:
    """The length that the model was made for, stretched by the rotary scaling."""
    rotary = model.rotary
    stretched = rotary.original_max_positions * rotary.factor if rotary.scaling != "none" else 0
    return max(model.max_positions, int(stretched))


def _warnings(model: ModelConfig, limits: Limits, chosen_dtype: str | None) -> Iterator[str]:
    """What the user should know; `chosen_dtype` is the engine's type if the user named none."""
    if (model.dtype, chosen_dtype) == ("bfloat16", "float16"):
        yield (
            "the checkpoint is bfloat16, which this back end does not have: the engine is float16, whose range is "
            "smaller; --dtype float32 keeps all of it"
        )
    if limits.max_positions > usable_positions(model) and model.rotary.scaling not in ("dynamic", "qwen_dynamic"):
        yield (
            f"sequences of up to {limits.max_positions} tokens are longer than the {usable_positions(model)} that the "
            "model was made for; consider --rotary-scaling"
        )


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
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


def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qwen-plugins")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of an engine; None if its checkpoint had none."""
    return load_tokenizer(folder) if _has_tokenizer(folder) else None


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (TOKENIZER_JSON, QWEN_TIKTOKEN))


def _check_tokenizer(model_dir: Path) -> list[str]:
    """What the user should know of the checkpoint's tokenizer; one that cannot be loaded is an error.

    Building needs no tokenizer: without the library of this one, only running with text says what is missing.
    """
    library = "tokenizers" if (model_dir / TOKENIZER_JSON).is_file() else "tiktoken"
    if _has_tokenizer(model_dir) and importlib.util.find_spec(library) is None:
        return []
    try:
        load_tokenizer(model_dir)
    except QwenModelError as error:
        if _has_tokenizer(model_dir):
            raise
        return [f"the engine will take token ids only: {error}"]
    return []
