"""Write a checkpoint's network as an ONNX file: the command `qwen-model export`."""

from __future__ import annotations

import argparse
import logging
import re
import shlex
from typing import TYPE_CHECKING

from .command_line import add_verbose_argument, parse_rotary_scaling, progress_bar, run_command
from .common.log import show_log

if TYPE_CHECKING:
    from .backends.onnx.graph import Tensor
    from .engine.export import ExportSummary

LOG = logging.getLogger("qwen_model.export")  # also where this module runs as __main__


def main(arguments: list[str] | None = None) -> None:
    """Export, with a progress bar on standard error and a summary on standard output."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    scaling = None if options.rotary_scaling is None else parse_rotary_scaling(options.rotary_scaling)

    from .engine.export import export_onnx

    with progress_bar(extra="onnx") as progress:
        summary = export_onnx(
            options.model_dir,
            output=options.output,
            operators=options.operators,
            dtype=options.dtype,
            max_batch_size=options.max_batch_size,
            max_input_len=options.max_input_len,
            max_output_len=options.max_output_len,
            max_num_tokens=options.max_num_tokens,
            kv_cache_dtype=options.kv_cache_dtype,
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
    parser.add_argument("--model-dir", metavar="DIR", help="checkpoint folder (default: the model in this package)")
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
    group = parser.add_argument_group("sizes", "With plug-ins only: a graph of standard operators takes any.")
    group.add_argument("--max-batch-size", type=int, metavar="N", help="sequences at a time (default: 256)")
    group.add_argument("--max-input-len", type=int, metavar="N", help="tokens of a prompt (default: up to 1024)")
    group.add_argument("--max-output-len", type=int, metavar="N", help="tokens generated (default: up to 512)")
    group.add_argument("--max-num-tokens", type=int, metavar="N", help="tokens of a step (default: up to 8192)")
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="TYPE",
        help="of the key-value cache: auto (default: as --dtype), int8 or fp8, with a scale for each token and head",
    )
    parser.add_argument(
        "--rotary-scaling",
        metavar="KIND:FACTOR",
        help="for sequences longer than the model was trained for, as of qwen-model build (default: the checkpoint's)",
    )
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
