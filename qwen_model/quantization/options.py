"""Name the ways in which the linear layers of a checkpoint that is not quantized can be quantized."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import QwenModelError, shown

KINDS = ("int8", "int4")
"""Of weights alone: x stays as it is."""
EIGHT_BIT_KINDS = ("smoothquant", "fp8")
"""Of weights and x, which are of the same kind: int8 or fp8 (e4m3)."""
QUANTIZATIONS = (*KINDS, *EIGHT_BIT_KINDS)
MODES = ("auto", "none", *QUANTIZATIONS)
"""What `build --quantization` takes: auto: as the checkpoint is; none: in the engine's type."""
GROUP_SIZES = (32, 64, 128, -1)
DEFAULT_GROUP_SIZE = 128
HEADS = ("int8", "int4", "none")
DEFAULT_ALPHA = 0.5


@dataclass(frozen=True)
class QuantizationOptions:
    """Say how linear layers are quantized.

    kind: of `QUANTIZATIONS`. "int8": a scale for each output; "int4": one for each output and group of inputs;
        "smoothquant": int8 weights and x, smoothed; "fp8": weights with a scale for each output, and x.
    group_size: inputs of a group of int4; -1: all of them.
    symmetric: no zero points.
    head: what the weights of the output projection are quantized to; None: they stay as they are.
    per_token: each token's x has its own scale, made at run time, rather than one that calibration found. fp8 has it
        unless it is calibrated.
    per_channel: each output of smoothquant's weights has its own scale, rather than the tensor.
    alpha: how much of the range of x smoothquant moves into the weights, 0 to 1; "auto": searched for each layer;
        "none": nothing is smoothed.

    Raises:
        QwenModelError: a value is not one of these.
    """

    kind: str
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = True
    head: str | None = "int8"
    per_token: bool = False
    per_channel: bool = False
    alpha: float | str = DEFAULT_ALPHA

    def __post_init__(self) -> None:
        if self.kind not in QUANTIZATIONS:
            raise QwenModelError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, not {self.kind!r}")
        if self.group_size not in GROUP_SIZES or isinstance(self.group_size, bool):
            raise QwenModelError(f"group_size must be 32, 64, 128 or -1 (all inputs), not {self.group_size!r}")
        if self.head is not None and self.head not in KINDS:
            raise QwenModelError(f"head_quantization must be one of {', '.join(HEADS)}, not {self.head!r}")
        if not _is_alpha(self.alpha):
            raise QwenModelError(f"alpha must be 0 to 1, auto or none, not {shown(self.alpha)}")

    @property
    def quantizes_x(self) -> bool:
        """Tell whether the inputs of linear layers are quantized, too."""
        return self.kind in EIGHT_BIT_KINDS


def _is_alpha(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value in ("auto", "none") or (number and 0 <= value <= 1)  # type: ignore[operator]


def quantization_options(
    kind: str,
    *,
    group_size: int | None = None,
    symmetric: bool | None = None,
    head: str | None = None,
    per_token: bool = False,
    per_channel: bool = False,
    alpha: float | str | None = None,
    activation_aware: bool = False,
    calibration: object = None,
) -> QuantizationOptions:
    """Return the options of a quantization that is made here, whose values a user gave, or None for the default.

    head: of `HEADS`; None: "int8" with a kind of `KINDS`, else "none".
    activation_aware, calibration: what is found by running the network over a text; see `build_engine`.

    Raises:
        QwenModelError: a value is none that there is, or not for this kind.
    """
    check_mixture(kind, group_size, symmetric, per_token, per_channel, alpha, activation_aware, calibration)
    if head is None:
        head = "int8" if kind in KINDS else "none"
    return QuantizationOptions(
        kind,
        DEFAULT_GROUP_SIZE if group_size is None else group_size,
        symmetric is not False,
        None if head == "none" else head,
        per_token or (kind == "fp8" and calibration is None),
        per_channel or kind == "fp8",
        DEFAULT_ALPHA if alpha is None else alpha,
    )


def check_mixture(
    kind: str,
    group_size: int | None = None,
    symmetric: bool | None = None,
    per_token: bool = False,
    per_channel: bool = False,
    alpha: float | str | None = None,
    activation_aware: bool = False,
    calibration: object = None,
) -> None:
    """Raise QwenModelError if an option is given that is for another kind of quantization."""
    given: dict[str, dict[str, object]] = {
        "int4": {"group_size (--group-size)": group_size, "symmetric (--asymmetric)": symmetric},
        "smoothquant": {
            "per_token (--per-token)": (per_token and kind != "fp8") or None,  # fp8 has it where it is not calibrated
            "per_channel (--per-channel)": per_channel or None,
            "alpha (--alpha)": alpha,
        },
    }
    for owner, options in given.items():
        for name, value in options.items():
            if kind != owner and value is not None:
                raise QwenModelError(f"{name} is for quantization {owner}, not {kind!r}")
    if activation_aware and kind not in KINDS:
        raise QwenModelError(
            f"activation_aware (--activation-aware) is for quantization {' or '.join(KINDS)}, not {kind!r}"
        )
    if calibration is not None and not activation_aware and kind not in EIGHT_BIT_KINDS:
        raise QwenModelError(
            "calibration (--calibration) is for activation_aware (--activation-aware) and for quantization "
            f"{' and '.join(EIGHT_BIT_KINDS)}, not {kind!r}"
        )
    if calibration is not None and per_token and (alpha == "none" or kind == "fp8"):
        smooths = "" if kind == "fp8" else " and alpha (--alpha) none"
        raise QwenModelError(
            f"calibration (--calibration) has nothing to find with per_token (--per-token){smooths}, for quantization "
            f"{kind}"
        )
