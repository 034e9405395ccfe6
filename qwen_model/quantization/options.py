"""Name the ways in which the weights of a checkpoint that is not quantized can be quantized."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import QwenModelError

KINDS = ("int8", "int4")
MODES = ("auto", "none", *KINDS)
"""What `build --quantization` takes: auto: as the checkpoint is; none: in the engine's type."""
GROUP_SIZES = (32, 64, 128, -1)
DEFAULT_GROUP_SIZE = 128
HEADS = ("int8", "int4", "none")


@dataclass(frozen=True)
class QuantizationOptions:
    """Say how linear layers are quantized.

    kind: "int8", with a scale for each output, or "int4", with one for each output and group of inputs.
    group_size: inputs of a group of int4; -1: all of them.
    symmetric: no zero points.
    head: what the output projection is quantized to; None: it stays as it is.

    Raises:
        QwenModelError: a value is not one of these.
    """

    kind: str
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = True
    head: str | None = "int8"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QwenModelError(f"quantization must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.group_size not in GROUP_SIZES or isinstance(self.group_size, bool):
            raise QwenModelError(f"group_size must be 32, 64, 128 or -1 (all inputs), not {self.group_size!r}")
        if self.head is not None and self.head not in KINDS:
            raise QwenModelError(f"head_quantization must be one of {', '.join(HEADS)}, not {self.head!r}")
