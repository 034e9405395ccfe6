"""Keep a reference in a safetensors file: the exact results as tensors, everything else as JSON in its metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.config import ModelConfig
from ...common.errors import QwenModelError, shown
from ...common.extras import import_extra
from ...common.files import check_readable, parse_json_object, write_whole
from ...interface.probe import Array
from .errors import Error
from .reference import Finding, Passes, Reference, result_names

FORMAT = "qwen_model.reference"
FORMAT_VERSION = 1


def write_reference(path: Path, reference: Reference) -> None:
    """Write the file whole or not at all.

    Raises:
        QwenModelError: it cannot be written.
    """
    save = import_extra("safetensors.numpy", "a file of reference values").save
    tensors = {f"{step}/{name}": x for step, values in enumerate(reference.values) for name, x in values.items()}
    tensors |= {f"sample/{name}": x for name, x in reference.samples.items()}
    described = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(reference.model),
        "prompt": reference.prompt,
        "output": reference.output,
        "original": reference.original,
        "difference": None if reference.difference is None else dataclasses.asdict(reference.difference),
        "own": {dtype: dataclasses.asdict(passes) for dtype, passes in reference.own.items()},
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}  # safetensors ignores strides
    try:
        write_whole(path, save(tensors, {FORMAT: json.dumps(described)}))
    except OSError as error:
        raise QwenModelError(f"{path} cannot be written: {error.strerror}") from error


def read_reference(path: Path) -> Reference:
    """Read a file of `write_reference`.

    Raises:
        QwenModelError: it cannot be read, is damaged, or is not such a file.
    """
    check_readable(path)
    safetensors = import_extra("safetensors", "a file of reference values")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = (file.metadata() or {}).get(FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except Exception as error:  # the library raises its own class, OSError and others
        raise QwenModelError(f"{path} cannot be read as safetensors: {shown(str(error))}") from error
    if metadata is None:
        raise QwenModelError(f"{path} is no file of reference values: make one with compare --save-reference")
    values = parse_json_object(metadata, str(path))
    if values.get("format_version") != FORMAT_VERSION:
        raise QwenModelError(
            f"{path} is of format {values.get('format_version')}, this version reads format {FORMAT_VERSION}: make it "
            "again with compare --save-reference"
        )
    try:
        reference = _reference(values, tensors)
        _check(reference)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # QwenModelError is a ValueError
        raise QwenModelError(
            f"{path} is damaged ({shown(str(error))}): make it again with compare --save-reference"
        ) from error
    return reference


def _reference(described: dict[str, Any], tensors: dict[str, Array]) -> Reference:
    model = ModelConfig.from_dict(described["model"])
    steps = range(1 + len(described["output"]))
    difference = described["difference"]
    return Reference(
        model=model,
        prompt=described["prompt"],
        output=described["output"],
        original=described["original"],
        difference=None if difference is None else Finding(**{**difference, "error": Error(**difference["error"])}),
        values=[{name: tensors[f"{step}/{name}"] for name in result_names(model)} for step in steps],
        own={dtype: _passes(passes) for dtype, passes in described["own"].items()},
        samples={name.partition("/")[2]: x for name, x in tensors.items() if name.startswith("sample/")},
    )


def _check(reference: Reference) -> None:
    """Raise ValueError if the parts do not belong together."""
    if not all(type(token) is int for token in (*reference.prompt, *reference.output)):
        raise ValueError("tokens are not integers")
    names = result_names(reference.model)
    for passes in reference.own.values():
        for steps in (passes.isolated, passes.chained):
            if len(steps) != len(reference.steps) or any(set(errors) != set(names) for errors in steps):
                raise ValueError("errors are not those of the steps")
    for (tokens, _), values in zip(reference.steps, reference.values, strict=True):
        if any(x.ndim != 2 or len(x) != len(tokens) for x in values.values()):
            raise ValueError("values are not those of the tokens")


def _passes(described: dict[str, Any]) -> Passes:
    return Passes(
        **{
            kind: [{name: Error(**error) for name, error in step.items()} for step in steps]
            for kind, steps in described.items()
        }
    )
