"""Add and read the options of the commands that read a checkpoint: build, export and quantize."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .common.errors import QwenModelError
from .common.files import parse_json_object
from .interface.engine_config import KV_CACHE_DTYPES
from .quantization.options import DEFAULT_ALPHA, DEFAULT_GROUP_SIZE, GROUP_SIZES, HEADS

if TYPE_CHECKING:
    from .quantization.summary import WeightSummary

WORST_LAYERS = 3
"""The layers whose errors summaries show."""


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add --model-dir."""
    parser.add_argument("--model-dir", metavar="DIR", help="checkpoint folder (default: the model in this package)")


def add_limit_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options that bound what an engine or an ONNX file takes, and say how its cache keeps numbers."""
    group.add_argument("--max-batch-size", type=int, metavar="N", help="sequences at a time (default: 256)")
    group.add_argument("--max-input-len", type=int, metavar="N", help="tokens of a prompt (default: up to 1024)")
    group.add_argument("--max-output-len", type=int, metavar="N", help="tokens generated (default: up to 512)")
    group.add_argument(
        "--max-num-tokens",
        type=int,
        metavar="N",
        help="tokens of prompts that are computed in one step; longer ones take several (default: up to 8192)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=KV_CACHE_DTYPES,
        help="how the key-value cache keeps a number: auto (default): as --dtype; int8 or fp8: in 8 bits, with a scale "
        "for each token and head, so that twice the tokens have room",
    )


def limit_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_limit_arguments`, as arguments of `build_engine`."""
    names = ("max_batch_size", "max_input_len", "max_output_len", "max_num_tokens", "kv_cache_dtype")
    return {name: getattr(options, name) for name in names}


def add_rotary_argument(parser: argparse.ArgumentParser) -> None:
    """Add --rotary-scaling, which `rotary_scaling` reads."""
    parser.add_argument(
        "--rotary-scaling",
        metavar="KIND:FACTOR",
        help="for sequences longer than the model was trained for: linear:4, dynamic:2, yarn:4, none, or the JSON "
        "object that rope_scaling is in a config.json (default: the checkpoint's)",
    )


def rotary_scaling(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return --rotary-scaling as an argument of `build_engine`.

    Raises:
        QwenModelError: see `parse_rotary_scaling`.
    """
    return None if options.rotary_scaling is None else parse_rotary_scaling(options.rotary_scaling)


def parse_rotary_scaling(text: str) -> dict[str, Any]:
    """Convert `linear:4`, `none` or a JSON object to what `rope_scaling` is in a `config.json`.

    Raises:
        QwenModelError: the text is none of these.
    """
    if text.lstrip().startswith("{"):
        return parse_json_object(text, "--rotary-scaling")
    kind, _, factor = text.partition(":")
    if not factor:
        return {"rope_type": kind}
    try:
        return {"rope_type": kind, "factor": float(factor)}
    except ValueError as error:
        raise QwenModelError(f"--rotary-scaling must be KIND:FACTOR, like linear:4, not {text!r}") from error


def add_quantization_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options beside --quantization, which `quantization_settings` returns."""
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help=f"with int4, the inputs that share a scale: {', '.join(map(str, GROUP_SIZES))} (all); default: "
        f"{DEFAULT_GROUP_SIZE}",
    )
    group.add_argument(
        "--asymmetric", action="store_true", help="with int4: zero points, a little more memory and less error"
    )
    group.add_argument(
        "--head-quantization",
        choices=HEADS,
        help="of the weights of the output projection (default: int8 where an engine is built with --quantization int8 "
        "or int4, else as the checkpoint is); the embedding stays as it is",
    )
    group.add_argument(
        "--activation-aware",
        action="store_true",
        help="with int4 or int8: scale the inputs of layers first, as AWQ does, by what the network does with a text; "
        "less error, and it needs PyTorch",
    )
    group.add_argument(
        "--per-token",
        action="store_true",
        help="with smoothquant: each token's input has a scale of its own, made at run time (default: one for all, "
        "which calibration finds); fp8 has it unless --calibration is given",
    )
    group.add_argument(
        "--per-channel",
        action="store_true",
        help="with smoothquant: each output of a weight has a scale of its own (default: the tensor)",
    )
    group.add_argument(
        "--alpha",
        type=_alpha,
        metavar="A",
        help="with smoothquant: how much of the range of inputs moves into the weights, 0 to 1; auto: searched for "
        f"each layer; none: nothing (default: {DEFAULT_ALPHA})",
    )
    group.add_argument(
        "--calibration",
        metavar="FILE",
        help='texts for --activation-aware and smoothquant, a line each, or JSONL of chats, {"messages": [...]} '
        "(default: the packaged model's held-out text); with fp8: one scale for all inputs of a layer, found there "
        "(default: each token has its own)",
    )


def _alpha(text: str) -> float | str:
    """Convert an option's value; argparse shows the error with the usage."""
    if text in ("auto", "none"):
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, auto or none, not {text!r}")
    return value


def quantization_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return --quantization and the options of `add_quantization_arguments`, as arguments of `build_engine`."""
    names = ("quantization", "group_size", "head_quantization", "activation_aware")
    settings = {name: getattr(options, name) for name in (*names, "per_token", "per_channel", "alpha", "calibration")}
    return {**settings, "symmetric": False if options.asymmetric else None}


def weights_text(weights: WeightSummary) -> str:
    """Return the lines of a summary about quantization, each with a line break; "" if there is none."""
    if not weights.bits:
        return ""
    formats = "; ".join(f"{count} x {text}" for text, count in weights.formats.items())
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in weights.part_bytes.items())
    lines = f"weights     {formats}\n            {weights.bits:.2f} bits a quantized weight; MiB: {parts}\n"
    worst = [f"{name} {error:.2%}" for name, error in weights.relative_errors.items()][:WORST_LAYERS]
    return lines + (f"error       of the weights, largest: {', '.join(worst)}\n" if worst else "")
