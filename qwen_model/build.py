"""Make an engine from a Hugging Face checkpoint: the command `qwen-model build`."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from .checkpoint_options import (
    add_limit_arguments,
    add_model_argument,
    add_quantization_arguments,
    add_rotary_argument,
    limit_settings,
    quantization_settings,
    rotary_scaling,
    weights_text,
)
from .command_line import DEFAULT_ENGINE_DIR, add_tuning_argument, add_verbose_argument, progress_bar, run_command
from .common.log import show_log
from .interface.engine_config import PLUGINS, RTX_COMPUTE_CAPABILITIES
from .quantization.options import MODES

if TYPE_CHECKING:
    from .engine import BuildSummary

LOG = logging.getLogger("qwen_model.build")  # also where this module runs as __main__


def main(arguments: list[str] | None = None) -> None:
    """Build, with a progress bar on standard error and a summary on standard output."""
    options = make_parser().parse_args(arguments)
    show_log(options.verbose)
    settings = _settings(options)
    if options.plan:
        print(_plan_text(settings))
        return
    from .engine import build_engine

    with progress_bar() as progress:
        summary = build_engine(**settings, output_dir=options.output_dir, tuning=options.tuning, progress=progress)
    for warning in summary.warnings:
        LOG.warning("%s", warning)
    print(_summary_text(summary))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that `build_engine` and `plan_engine` share."""
    return {
        "model_dir": options.model_dir,
        "backend": options.backend,
        "dtype": options.dtype,
        "disable_plugins": options.disable_plugin,
        "rmsnorm_plugin": options.rmsnorm_plugin,
        **limit_settings(options),
        **quantization_settings(options),
        "rotary_scaling": rotary_scaling(options),
        "timing_cache": options.timing_cache,
        "hardware_compatible": options.hardware_compatible,
        "compute_capabilities": options.compute_capability,
    }


def make_parser() -> argparse.ArgumentParser:
    """Describe the command's options."""
    parser = argparse.ArgumentParser(
        prog="qwen-model build", description="Make an engine from a Hugging Face checkpoint."
    )
    add_model_argument(parser)
    parser.add_argument(
        "--output-dir", default=DEFAULT_ENGINE_DIR, metavar="ENGINE", help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--backend", default="torch", help="what runs the engine: torch (default), tensorrt or tensorrt-rtx"
    )
    parser.add_argument(
        "--dtype",
        metavar="TYPE",
        help="float16, bfloat16 or float32 (default: the checkpoint's where there is a GPU, else float32)",
    )
    parser.add_argument(
        "--disable-plugin",
        nargs="+",
        action="extend",
        default=[],
        choices=PLUGINS,
        metavar="NAME",
        help="use the back end's own operations in place of this project's kernels, to compare them: rms_norm, gemm "
        "(the linear layers), rotary (the rotary embedding, applied before attention and not inside it)",
    )
    parser.add_argument(
        "--rmsnorm-plugin",
        action=argparse.BooleanOptionalAction,
        help="--rmsnorm-plugin is the default, --no-rmsnorm-plugin the same as --disable-plugin rms_norm",
    )
    add_limit_arguments(parser)
    _add_quantization_arguments(parser)
    add_rotary_argument(parser)
    parser.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="keeps the timings of TensorRT's builder for later builds (default: a file in the user's cache folder)",
    )
    parser.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="tensorrt: for any GPU of compute capability 8.0 or later, not only for one like that of this machine",
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        action="extend",
        metavar="N.N",
        help=f"tensorrt-rtx: of the GPUs that the engine is for: {', '.join(RTX_COMPUTE_CAPABILITIES)} (default: all)",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the memory that such an engine needs on a GPU, with --max-batch-size sequences (by default one) of "
        "--max-input-len and --max-output-len tokens in its cache, and which cards have it; build nothing",
    )
    add_tuning_argument(parser)
    add_verbose_argument(parser)
    return parser


def _add_quantization_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization of linear layers", "see docs/quantization.md")
    group.add_argument(
        "--quantization",
        default="auto",
        choices=MODES,
        help="int8 or int4: of their weights; smoothquant or fp8: of their inputs, too, in int8 or fp8; auto "
        "(default): as the checkpoint is; none: in the engine's type, also if the checkpoint is quantized",
    )
    add_quantization_arguments(group)


def _plan_text(settings: dict[str, Any]) -> str:
    from .engine.plan import fitting_cards, plan_engine

    plan = plan_engine(**settings)
    mib = 2.0**20
    differs = plan.dtype_here not in (None, plan.dtype)
    here = f" on a GPU; on this machine build makes {plan.dtype_here}, unless --dtype is given" if differs else ""
    cards = ", ".join(f"{card} GB {count or 'none'}" for card, count in fitting_cards(plan).items())
    return (
        f"type        {plan.dtype}{here}\n"
        f"{weights_text(plan.weights)}"
        f"needs       {plan.total_bytes / mib:,.0f} MiB for {plan.sequences} sequence{'s' * (plan.sequences != 1)} "
        f"of {plan.positions} tokens\n"
        f"weights     {plan.weight_bytes / mib:,.1f} MiB\n"
        f"activations {plan.activation_bytes / mib:,.1f} MiB in the largest step\n"
        f"cache       {plan.token_bytes / 1024:,.1f} KiB a token, {plan.sequence_bytes / mib:,.1f} MiB a sequence\n"
        f"cards       sequences of {plan.positions} tokens that have room: {cards}"
    )


def _summary_text(summary: BuildSummary) -> str:
    config = summary.config
    limits = config.limits
    without = f", without the plug-ins {', '.join(config.disabled_plugins)}" if config.disabled_plugins else ""
    cached = "" if config.kv_cache_dtype == "auto" else f" in {config.kv_cache_dtype}"
    capabilities = ", ".join(config.compute_capabilities)
    built_for = f"GPUs        of compute capability {capabilities}\n" if capabilities else ""
    return (
        f"engine      {summary.engine_dir}\n"
        f"model       {config.model.architecture}, {config.num_parameters / 1e6:,.1f} million parameters, "
        f"{config.model.num_layers} layers\n"
        f"back end    {config.backend}, {config.dtype}{without}\n{built_for}"
        f"limits      {limits.max_batch_size} sequences, prompts of {limits.max_input_len} tokens, "
        f"outputs of {limits.max_output_len} tokens, steps of {limits.max_num_tokens} tokens\n"
        f"{weights_text(summary.weights)}"
        f"memory      {summary.weight_bytes / 2**20:,.1f} MiB of weights, "
        f"{summary.sequence_bytes / 2**20:,.1f} MiB of key-value cache{cached} for each sequence\n"
        f"time        {summary.seconds:.1f} s"
    )


if __name__ == "__main__":
    run_command(main)
