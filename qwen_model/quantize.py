"""Write a quantized checkpoint, which transformers and vLLM load as well: the command `qwen-model quantize`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .command_line import add_int4_arguments, add_verbose_argument, progress_bar, run_command, weights_text
from .common.log import show_log
from .quantization.options import KINDS

if TYPE_CHECKING:
    from .engine.quantize import QuantizeSummary


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
            quantization=options.quantization,
            group_size=options.group_size,
            symmetric=False if options.asymmetric else None,
            progress=progress,
        )
    print(_summary_text(summary))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model quantize",
        description="Write a quantized checkpoint, which transformers and vLLM load as well.",
    )
    parser.add_argument("--model-dir", metavar="DIR", help="checkpoint folder (default: the model in this package)")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="a new or an empty folder")
    parser.add_argument(
        "--format",
        default="compressed-tensors",
        choices=("compressed-tensors", "gptq"),
        help="how the checkpoint is stored (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        default="int4",
        choices=KINDS,
        help="of the linear layers but the output projection: int4 (default) or int8, with a scale for each output",
    )
    add_int4_arguments(parser)
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
