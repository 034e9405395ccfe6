"""Write a checkpoint's network as an ONNX file: the command `qwen-model export`."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
from typing import TYPE_CHECKING

from .checkpoint_options import (
    add_limit_arguments,
    add_model_argument,
    add_rotary_argument,
    limit_settings,
    rotary_scaling,
)
from .command_line import add_verbose_argument, progress_bar, run_command
from .common.log import show_log

if TYPE_CHECKING:
    from .backends.onnx.graph import Tensor
    from .engine.export import ExportSummary

LOG = logging.getLogger("qwen_model.export")  # also where this module runs as __main__


def main(arguments: list[str] | None = None) -> None:
    """Export, with a progress bar on standard error and a summary on standard output."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    scaling = rotary_scaling(options)

    from .engine.export import export_onnx

    with progress_bar(extra="onnx") as progress:
        summary = export_onnx(
            options.model_dir,
            output=options.output,
            operators=options.operators,
            dtype=options.dtype,
            **limit_settings(options),
            rotary_scaling=scaling,
            progress=progress,
        )
    for warning in summary.warnings:
        LOG.warning("%s", warning)
    print(_summary_text(summary))


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model export", description="Write a checkpoint's network as an ONNX file."
    )
    add_model_argument(parser)
    parser.add_argument("--output", required=True, metavar="FILE.onnx", help="large weights go to FILE.onnx.data")
    parser.add_argument(
        "--operators",
        default="plugins",
        metavar="KIND",
        help="plugins (default): this project's TensorRT plug-ins as nodes; standard: ONNX's own operators alone",
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float16, bfloat16 or float32 (default: the checkpoint's with plug-ins, float32 with standard operators)",
    )
    add_limit_arguments(
        parser.add_argument_group("sizes", "With plug-ins only: a graph of standard operators takes any.")
    )
    add_rotary_argument(parser)
    add_verbose_argument(parser)
    return parser


def _summary_text(summary: ExportSummary) -> str:
    written, limits = summary.written, summary.limits
    lines = [
        f"file        {summary.path}",
        *([] if written.weights_file is None else [f"weights     {written.weights_file}"]),
        f"model       {summary.model.architecture}, {summary.num_parameters / 1e6:,.1f} million parameters, "
        f"{summary.model.num_layers} layers",
        f"operators   {summary.operators}, {summary.dtype}, opset {written.opset}, {written.num_nodes} nodes",
        *_tensor_lines("inputs", written.inputs),
        *_tensor_lines("outputs", written.outputs),
    ]
    if limits is not None:
        lines.append(
            f"limits      {limits.max_batch_size} sequences, prompts of {limits.max_input_len} tokens, "
            f"outputs of {limits.max_output_len} tokens"
        )
    lines += [f"size        {written.num_bytes / 2**20:,.1f} MiB", f"time        {summary.seconds:.1f} s"]
    if summary.profiles:
        lines += ["", "An engine with TensorRT, where LIBRARY is qwen_plugins.tensorrt_library_path(10), or 11:", ""]
        lines.append(_trtexec(summary))
    return "\n".join(lines)


def _trtexec(summary: ExportSummary) -> str:
    """Return the command that builds an engine of a file with plug-ins."""
    path = str(summary.path)
    words = ["--stronglyTyped", "--skipInference", "--dynamicPlugins=LIBRARY"]  # with random lengths nothing can run
    lines = [shlex.join(["trtexec", f"--onnx={path}", f"--saveEngine={path.removesuffix('.onnx')}.plan", *words])]
    for index, profile in enumerate(summary.profiles):
        lines.append(f"    --profile={index}")
        for kind, option in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = (f"{name}:{'x'.join(map(str, shapes[kind]))}" for name, shapes in profile.items())
            lines.append(f"    --{option}={','.join(shapes)}")
    return " \\\n".join(lines)


def _tensor_lines(title: str, tensors: tuple[Tensor, ...]) -> list[str]:
    """List tensors, those of all layers as one line."""
    alike: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(re.sub(r"(?<=[._])\d+(?=\.|$)", "*", tensor.name), []).append(tensor)
    rows = []
    for name, (tensor, *others) in alike.items():
        layers = f"0...{len(others)}" if others else "0"
        shape = ", ".join(map(str, tensor.shape))
        rows.append(f"{name.replace('*', layers):30}{tensor.dtype:10}[{shape}]")
    return [f"{title if i == 0 else '':12}{row}" for i, row in enumerate(rows)]


if __name__ == "__main__":
    run_command(main)
