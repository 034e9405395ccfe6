"""Show what is in an engine, and how long each layer of a TensorRT engine takes, as tables and as a picture."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from ..checkpoints.module_weights import WeightFormat
from ..common.errors import QwenModelError
from ..engine import load_engine
from ..interface.engine_config import EngineConfig, GemmKernels
from ..tuning.choice import KernelRange, ranges
from ..tuning.linear_layers import LinearShape, linear_layers

if TYPE_CHECKING:
    from ..backends.tensorrt.inspection import LayerInfo, TensorInfo

DEFAULT_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class LinearKernels:
    """Say which GEMM kernels serve the linear layers whose names differ only in numbers."""

    name: str
    count: int
    shape: str
    kernels: list[KernelRange]


@dataclass(frozen=True)
class Inspection:
    """Hold everything that `qwen-model inspect` prints."""

    engine_dir: str
    config: dict[str, Any]
    num_sequences: int
    prompt_tokens: int
    linear_layers: list[LinearKernels]
    tensors: list[TensorInfo]  # of a TensorRT engine
    layers: dict[str, list[LayerInfo]]  # of a TensorRT engine, in "prefill" and "decode"


@dataclass(frozen=True)
class Share:
    """Sum up the layers whose names differ only in numbers."""

    name: str
    kind: str
    count: int
    milliseconds: float


def inspect_engine(
    engine_dir: str, num_sequences: int = 1, prompt_tokens: int | None = None, device: str | None = None
) -> Inspection:
    """Load an engine and return what is in it; run a TensorRT engine to see how long each layer takes.

    num_sequences: sequences of the decode step, and prompts of the prefill.
    prompt_tokens: tokens of each prompt; None: 128, or the engine's limit if that is lower.

    Raises:
        QwenModelError: it is not an engine that runs here, or a number exceeds its limits.
    """
    config = EngineConfig.read(Path(engine_dir))
    limits = config.limits
    tokens = min(DEFAULT_PROMPT_TOKENS, limits.max_input_len) if prompt_tokens is None else prompt_tokens
    for name, value, limit in (
        ("--sequences", num_sequences, limits.max_batch_size),
        ("--prompt-tokens", tokens, limits.max_input_len),
    ):
        if not 1 <= value <= limit:
            raise QwenModelError(f"{name} must be 1 to {limit}, the engine's limit, not {value}")
    loaded: Any = load_engine(engine_dir, device=device).device
    tensors, layers = [], {}
    if config.backend in ("tensorrt", "tensorrt-rtx"):
        # Imported here because load_engine checks first that TensorRT is installed.
        from ..backends.tensorrt import inspection as tensorrt_inspection

        prompts = [[index % config.model.vocab_size for index in range(tokens)]] * num_sequences
        tensors = tensorrt_inspection.tensors(loaded.tensorrt, loaded.engine)
        layers = tensorrt_inspection.layers(loaded, prompts)
    kernels = _linear_kernels(config, loaded.gemm_kernels)
    return Inspection(str(engine_dir), asdict(config), num_sequences, tokens, kernels, tensors, layers)


def _linear_kernels(config: EngineConfig, chosen: GemmKernels | None) -> list[LinearKernels]:
    """Return the GEMM kernels of each kind of linear layer; none where the back end's own products run."""
    if chosen is None:
        return []
    kernels: dict[tuple[str, LinearShape], int] = {}
    for module, shape in linear_layers(config.model, config.dtype, config.weight_formats).items():
        kind = re.sub(r"\d+", "*", module), shape
        kernels[kind] = kernels.get(kind, 0) + 1
    return [
        LinearKernels(name, count, shape.text, ranges(chosen.get(shape.text, ())))
        for (name, shape), count in kernels.items()
    ]


def shares(layers: list[LayerInfo]) -> list[Share]:
    """Group layers whose names differ only in numbers, the slowest group first."""
    groups: dict[str, list[LayerInfo]] = {}
    for layer in layers:
        groups.setdefault(re.sub(r"\d+", "*", layer.name), []).append(layer)
    found = [
        Share(name, group[0].kind, len(group), sum(layer.milliseconds for layer in group))
        for name, group in groups.items()
    ]
    return sorted(found, key=lambda share: -share.milliseconds)


def text(found: Inspection, every_layer: bool = False) -> str:
    """Format the inspection as tables."""
    config = found.config
    limits = config["limits"]
    lines = [
        f"engine    {found.engine_dir}: {config['model']['architecture']}, {config['dtype']}, "
        f"{config['num_parameters'] / 1e6:,.1f} million parameters",
        f"built by  {', '.join(f'{name} {version}' for name, version in config['versions'].items())}",
        f"limits    {limits['max_batch_size']} sequences, prompts of {limits['max_input_len']} tokens, outputs of "
        f"{limits['max_output_len']} tokens",
    ]
    formats = Counter(WeightFormat(**each).text for each in config["weight_formats"].values())
    if formats:
        quantized = "; ".join(f"{count} x {text}" for text, count in formats.items())
        lines.append(f"weights   {quantized}; others {config['dtype']}")  # the embedding and norms, at least
    if config["kv_cache_dtype"] != "auto":
        lines.append(f"cache     {config['kv_cache_dtype']}")
    if found.linear_layers:
        lines += ["", "GEMM kernels of the linear layers, by the rows of x", *table(_kernel_rows(found.linear_layers))]
    if found.tensors:
        lines += ["", "inputs and outputs (decode and prefill: smallest, usual, largest first dimension)"]
        lines += table([_tensor_row(tensor) for tensor in _without_repeats(found.tensors)])
    loads = {
        "prefill": f"prefill of {found.num_sequences} x {found.prompt_tokens} tokens",
        "decode": f"one step of decode, {found.num_sequences} sequences",
    }
    for phase, every in found.layers.items():
        layers = [layer for layer in every if layer.kind != "Constant"]  # constants take no time
        total = sum(layer.milliseconds for layer in layers)
        lines += ["", f"{loads[phase]}: {total:.3f} ms in {len(layers)} layers, each timed on its own"]
        rows = [Share(layer.name, layer.kind, 1, layer.milliseconds) for layer in layers]
        lines += table([_share_row(share, total) for share in (rows if every_layer else shares(layers))])
    return "\n".join(lines)


def _kernel_rows(layers: list[LinearKernels]) -> list[list[str]]:
    rows = []
    for layer in layers:
        labels = [f"{layer.count:4} x", layer.name, layer.shape]
        for part in layer.kernels:
            rows.append([*labels, f"{part.first_row} to {part.last_row or ''}".rstrip(), part.kernel])
            labels = ["", "", ""]
    return rows


def _tensor_row(tensor: TensorInfo) -> list[str]:
    limits = [" ".join(str(shape[0]) for shape in profile) if -1 in tensor.shape else "" for profile in tensor.profiles]
    return [tensor.name, tensor.mode, tensor.dtype, str(list(tensor.shape)), *limits]


def _without_repeats(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """Leave out the caches of all layers but the first, since they are alike."""
    return [tensor for tensor in tensors if not re.search(r"_key_value_[1-9]", tensor.name)]


def _share_row(share: Share, total: float) -> list[str]:
    return [
        f"{share.milliseconds:9.4f} ms",
        f"{100 * share.milliseconds / total:5.1f} %",
        f"{share.count:4} x",
        share.name,
        share.kind,
    ]


def table(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines, their columns aligned."""
    columns = max(len(row) for row in rows)
    padded = [[*row, *[""] * (columns - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in padded) for column in range(columns)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in padded]


BAR_HEIGHT, LABEL_WIDTH, BAR_WIDTH = 22, 330, 420
DRAWN_BY = "<!-- qwen-model inspect -->"
"""Marks the beginning of a file as a picture of this command, which may be replaced."""


def check_picture(path: Path) -> None:
    """Raise QwenModelError if no picture can be written there, or one would replace a file that is not ours."""
    if path.suffix != ".svg":
        raise QwenModelError(f"--picture draws an SVG: give a name that ends in .svg, not {path}")
    place = Path(os.path.realpath(path))
    if not place.parent.is_dir():
        raise QwenModelError(f"--picture {path}: there is no folder {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=place.parent):
            beginning = _first_bytes(place, 1000)
    except OSError as error:
        raise QwenModelError(f"{path} cannot be written: {error.strerror}") from error
    if beginning and DRAWN_BY.encode() not in beginning:
        raise QwenModelError(f"{path} already exists and is no picture of this command: give another name")


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        return b""


def picture(found: Inspection) -> str:
    """Draw an SVG with a bar for each kind of layer, in decode and in prefill."""
    parts, y = [], 10
    for phase, layers in found.layers.items():
        total = sum(layer.milliseconds for layer in layers)
        y += 24
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{phase}: {total:.3f} ms</text>')
        groups = shares(layers)
        for share in groups:
            y += BAR_HEIGHT
            width = BAR_WIDTH * share.milliseconds / groups[0].milliseconds
            parts += [
                f'<text x="10" y="{y}">{share.count} x {escape(share.name)}</text>',
                f'<rect x="{LABEL_WIDTH}" y="{y - 12}" width="{width:.1f}" height="15" fill="#4878a8"/>',
                f'<text x="{LABEL_WIDTH + width + 6:.1f}" y="{y}">{share.milliseconds:.3f} ms, '
                f"{100 * share.milliseconds / total:.1f} %</text>",
            ]
        y += 16
    width = LABEL_WIDTH + BAR_WIDTH + 140
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, DRAWN_BY, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>\n"])
