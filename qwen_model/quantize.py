"""Write a quantized checkpoint, which transformers and vLLM load as well: the command `qwen-model quantize`."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from .checkpoint_options import (
    add_model_argument,
    add_quantization_arguments,
    quantization_settings,
    weights_text,
)
from .command_line import add_verbose_argument, progress_bar, run_command
from .common.log import show_log
from .quantization.options import QUANTIZATIONS

if TYPE_CHECKING:
    from .engine.quantize import QuantizeSummary

LOG = logging.getLogger("qwen_model.quantize")  # also where this module runs as __main__


def main(arguments: list[str] | None = None) -> None:
    """Quantize, with a progress bar on standard error and a summary on standard output."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)

    from .engine.quantize import quantize_checkpoint

    with progress_bar(extra="torch") as progress:
        summary = quantize_checkpoint(
            options.model_dir,
            output_dir=options.output_dir,
            stored_as=options.format,
            **quantization_settings(options),
            progress=progress,
        )
    for warning in summary.warnings:
        LOG.warning("%s", warning)
    print(_summary_text(summary))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model quantize",
        description="Write a quantized checkpoint, which transformers and vLLM load as well.",
    )
    add_model_argument(parser)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument(
        "--format",
        default="compressed-tensors",
        choices=("compressed-tensors", "gptq"),
        help="how the checkpoint is stored (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of the linear layers but the output projection: int4 or int8: of their weights; smoothquant or fp8: of "
        "their inputs, too, in int8 or fp8 (default: smoothquant with its options, or with --calibration but not "
        "--activation-aware; else int4)",
    )
    add_quantization_arguments(parser)
    add_verbose_argument(parser)
    return parser


def _summary_text(summary: QuantizeSummary) -> str:
    return (
        f"checkpoint  {summary.output_dir}, {summary.stored_as}\n"
        f"model       {summary.model.architecture}, {summary.model.num_layers} layers\n"
        f"{weights_text(summary.weights)}"
        f"size        {summary.weight_bytes / 2**20:,.1f} MiB\n"
        f"time        {summary.seconds:.1f} s"
    )


if __name__ == "__main__":
    run_command(main)
