"""Build an engine from a checkpoint.

An engine is a folder: `config.json` (see interface/engine_config.py), the tokenizer's files, and the weights. The torch
back end has a folder `weights/` with a safetensors file for the embedding, for each layer and for the output, the
TensorRT back end a file `model.plan`. An engine is written whole or not at all (see output_folder.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import platform
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import DTYPES, ModelConfig
from ..checkpoints.generation_config import GenerationConfig
from ..checkpoints.hugging_face_tokenizer import TOKENIZER_JSON
from ..checkpoints.module_weights import Formats
from ..checkpoints.tokenizer import copy_tokenizer_files, has_tokenizer, load_tokenizer
from ..checkpoints.weights import network_modules, num_parameters
from ..common.errors import QwenModelError
from ..common.log import Stopwatch
from ..common.progress import Progress, no_progress
from ..common.version import package_version
from ..interface.back_end import BackEnd
from ..interface.engine_config import BACKENDS, KV_CACHE_DTYPES, EngineConfig, Limits
from ..interface.memory import page_bytes, sequence_pages, weight_bytes
from ..interface.sampling import SamplingDefaults
from ..quantization.engine_weights import EngineWeights
from ..quantization.formats import chosen_formats
from ..quantization.key_balance import key_factors
from ..quantization.options import QUANTIZATIONS, QuantizationOptions, quantization_options
from ..quantization.summary import WeightSummary, error_warnings, weight_summary
from .arguments import (
    check_choice,
    check_timing_cache,
    chosen_capabilities,
    disabled_names,
    model_folder,
    quantization_words,
)
from .back_ends import back_end
from .calibration import calibrated_weights, calibration_warnings
from .limits import engine_limits, usable_positions
from .output_folder import output_place, written_whole

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildSummary:
    """Describe the engine that `build_engine` made. The key-value cache is allocated when it is loaded."""

    engine_dir: Path
    config: EngineConfig
    weight_bytes: int
    sequence_bytes: int  # of the longest sequence in the key-value cache
    seconds: float
    warnings: tuple[str, ...]
    weights: WeightSummary


def build_engine(
    model_dir: str | os.PathLike[str] | None = None,
    *,
    output_dir: str | os.PathLike[str],
    backend: str = "torch",
    dtype: str | None = None,
    disable_plugins: Collection[str] = (),
    rmsnorm_plugin: bool | None = None,
    max_batch_size: int | None = None,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
    max_num_tokens: int | None = None,
    kv_cache_dtype: str = "auto",
    quantization: str = "auto",
    group_size: int | None = None,
    symmetric: bool | None = None,
    head_quantization: str | None = None,
    activation_aware: bool = False,
    per_token: bool = False,
    per_channel: bool = False,
    alpha: float | str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    rotary_scaling: Mapping[str, Any] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    tuning: bool = True,
    hardware_compatible: bool = False,
    compute_capabilities: Collection[str] | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """Make an engine in `output_dir` from a Hugging Face checkpoint (None: the model in this package).

    backend: "torch", "tensorrt" or "tensorrt-rtx". A TensorRT engine is built where it is to run: for that GPU and
        TensorRT. One of TensorRT-RTX is built on any machine and runs on RTX cards.
    dtype: "float16", "bfloat16" or "float32"; None: the checkpoint's where there is a GPU, else "float32".
    disable_plugins: names of kernels of this project to replace by the back end's own operations, to compare them:
        "rms_norm", "gemm" (the linear layers), "rotary" (the rotary embedding, then applied before attention).
    rmsnorm_plugin: False is the same as "rms_norm" in `disable_plugins`.
    max_batch_size: sequences at a time; a beam is a sequence. None: 256. They share the memory of the key-value cache,
        which is as large as there is room for when the engine is loaded.
    max_input_len, max_output_len: tokens of a prompt, and tokens generated for it. None: up to 1024 and 512.
    max_num_tokens: tokens of prompts, or parts of them, that are computed in one step. None: up to 8192.
    kv_cache_dtype: how the key-value cache keeps a number: "auto": in the engine's type; "int8" or "fp8": in 8 bits,
        with a scale for each token and head.
    quantization: of linear layers: "int8" or "int4": of their weights; "smoothquant" or "fp8": of their inputs, too, in
        int8 or e4m3; "auto": as the checkpoint is; "none": in the engine's type, also if the checkpoint is quantized.
    group_size: with "int4", the inputs that share a scale: 32, 64, 128, or -1 for all. None: 128.
    symmetric: with "int4", whether there are no zero points. None: True.
    head_quantization: of the weights of the output projection: "int8", "int4" or "none". None: "int8" with "int8" and
        "int4", else as the checkpoint is.
    activation_aware: with "int8" or "int4", scale the inputs of layers before they are quantized here, as AWQ does, by
        what the network does with a text; it needs PyTorch.
    per_token, per_channel: with "smoothquant", whether each token's input, and each output of a weight, has a scale of
        its own. Without `per_token` calibration finds one for all tokens; without `per_channel` each tensor has one.
    alpha: with "smoothquant", how much of the range of the inputs is moved into the weights, 0 to 1; "auto": searched
        for each layer; "none": nothing. None: 0.5.
    calibration: the file of texts for `activation_aware` and "smoothquant", see `engine.calibration`; None: the
        packaged model's held-out text. With "fp8" inputs have one scale for all tokens, which the texts give; without
        it each token has its own.
    rotary_scaling: replaces the checkpoint's `rope_scaling`, in the same form.
    timing_cache: file with the timings of TensorRT's builder, read and written; None: one in the user's cache folder.
    tuning: time the GEMM kernels of the linear layers on the GPU before a TensorRT engine is built, which takes
        seconds; the times are kept in the user's cache folder. False: rules choose the kernels.
    hardware_compatible: True: a TensorRT engine runs on any GPU of compute capability 8.0 or later, slower perhaps, and
        not only on the builder's model.
    compute_capabilities: of the GPUs that a TensorRT-RTX engine is for, such as ["8.6", "12.0"]; None: all of
        `RTX_COMPUTE_CAPABILITIES`.
    progress: see `Progress`.

    An engine in `output_dir` is replaced, in one step if the file system can; a folder with anything else in it is an
    error. If `output_dir` is a symbolic link, the engine is written to its target.

    Raises:
        QwenModelError: an argument is wrong, the checkpoint cannot be read or is not supported, or `output_dir` cannot
            be written. Nothing has changed then.
    """
    start, watch = time.perf_counter(), Stopwatch(LOG)
    check_choice("backend", backend, BACKENDS)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
    capabilities = chosen_capabilities(backend, hardware_compatible, compute_capabilities)
    disabled = disabled_names(disable_plugins, rmsnorm_plugin, backend)
    source = model_folder(model_dir)
    target = output_place(output_dir, source)
    options = _timing_cache_option(timing_cache, backend, target)
    model = ModelConfig.from_model_dir(source).with_rotary_scaling(rotary_scaling)
    limits = engine_limits(model, max_batch_size, max_input_len, max_output_len, max_num_tokens)
    engine_back_end = back_end(backend)
    watch.lap(f"back end {backend} imported")
    checkpoint = Checkpoint(source, engine_back_end.FRAMEWORK)
    checkpoint.check(model)
    watch.lap(f"checkpoint {source} ({model.architecture}) opened and checked")
    model = dataclasses.replace(model, dtype=model.dtype or checkpoint.dtype)
    engine_dtype = dtype or engine_back_end.default_dtype(model.dtype)
    asked: dict[str, Any] = {
        "group_size": group_size,
        "symmetric": symmetric,
        "per_token": per_token,
        "per_channel": per_channel,
        "alpha": alpha,
        "activation_aware": activation_aware,
        "calibration": calibration,
    }
    formats = chosen_formats(checkpoint, model, engine_dtype, quantization, head=head_quantization, **asked)
    own = quantization_options(quantization, head=head_quantization, **asked) if quantization in QUANTIZATIONS else None
    generation = GenerationConfig.from_model_dir(source, model.vocab_size)
    tokenizer_warnings = _check_tokenizer(source)
    watch.lap("tokenizer checked")

    config = EngineConfig(
        backend=backend,
        dtype=engine_dtype,
        limits=limits,
        model=model,
        end_token_ids=generation.end_token_ids,
        num_parameters=num_parameters(model),
        versions=_versions(engine_back_end, capabilities),
        disabled_plugins=disabled,
        sampling_defaults=SamplingDefaults.from_generation_config(generation.sampling),
        compute_capabilities=capabilities,
        kv_cache_dtype=kv_cache_dtype,
        weight_formats=formats,
        quantization_options=quantization_words(quantization, head_quantization, asked),
    )
    key_warnings = balance_keys(checkpoint, model, formats, kv_cache_dtype)
    warnings = [
        *tokenizer_warnings,
        *_generation_warnings(generation),
        *limit_warnings(model, limits, config.dtype if dtype is None else None),
        *_scale_warnings(formats, config.dtype),
        *key_warnings,
        *cache_scale_warnings(checkpoint),
        *([] if own is None else calibration_warnings(own, activation_aware, calibration)),
    ]
    report = progress or no_progress
    read_weight = _engine_weights(checkpoint, config, own, activation_aware, calibration, report)
    if tuning:
        config = dataclasses.replace(config, gemm_kernels=engine_back_end.choose_kernels(config, report))
    with written_whole(target) as folder:
        warnings += engine_back_end.write_engine(folder, config, read_weight, report, **options)
        copy_tokenizer_files(source, folder)
        config.write(folder)
    watch.lap(f"engine {target} written")
    seconds = time.perf_counter() - start
    warnings += error_warnings(formats, read_weight.relative_errors)
    return _summary(target, config, read_weight.relative_errors, warnings, seconds)


def _timing_cache_option(timing_cache: str | os.PathLike[str] | None, backend: str, target: Path) -> dict[str, Path]:
    """Return the argument of a back end's `write_engine`, if there is one."""
    check_timing_cache(timing_cache, backend)
    if timing_cache is None:
        return {}
    if Path(os.path.realpath(timing_cache)).is_relative_to(target):
        raise QwenModelError(f"the timing cache {timing_cache} would be in the engine's folder: give a file elsewhere")
    return {"timing_cache": Path(timing_cache)}


def _versions(engine_back_end: BackEnd, capabilities: tuple[str, ...]) -> dict[str, str]:
    """Return what an engine is built with."""
    own = {"qwen_model": package_version(), "python": platform.python_version()}
    return {**own, **engine_back_end.versions(capabilities)}


def _engine_weights(
    checkpoint: Checkpoint,
    config: EngineConfig,
    own: QuantizationOptions | None,
    activation_aware: bool,
    calibration: str | os.PathLike[str] | None,
    report: Progress,
) -> EngineWeights:
    """Return what reads the engine's weights, calibrated if need be; own: how they are quantized here."""
    model, formats, calibrated = config.model, config.weight_formats, None
    if own is not None:
        calibrated = calibrated_weights(checkpoint, model, formats, own, activation_aware, calibration, report)
    per_channel = own is None or own.per_channel
    return EngineWeights(checkpoint, network_modules(model, config.dtype, formats), calibrated, per_channel)


def _summary(
    target: Path, config: EngineConfig, relative_errors: Mapping[str, float], warnings: Iterable[str], seconds: float
) -> BuildSummary:
    model, dtype, formats = config.model, config.dtype, config.weight_formats
    return BuildSummary(
        target,
        config,
        weight_bytes(model, dtype, formats),
        sequence_pages(config.limits) * page_bytes(model, dtype, config.kv_cache_dtype),
        seconds,
        tuple(warnings),
        weight_summary(model, dtype, formats, relative_errors),
    )


def limit_warnings(model: ModelConfig, limits: Limits, chosen_dtype: str | None) -> Iterator[str]:
    """Yield warnings about type and length; `chosen_dtype` is the engine's type if the user did not choose it."""
    if (model.dtype, chosen_dtype) == ("bfloat16", "float16"):
        yield (
            "the checkpoint is bfloat16, which this back end does not have: the engine is float16, whose range is "
            "smaller; use --dtype float32 to keep the range"
        )
    if limits.max_positions > usable_positions(model) and model.rotary.scaling not in ("dynamic", "qwen_dynamic"):
        yield (
            f"sequences of up to {limits.max_positions} tokens are longer than the {usable_positions(model)} that the "
            "model was made for; consider --rotary-scaling"
        )


def _scale_warnings(formats: Formats, dtype: str) -> Iterator[str]:
    scales = {each.scale_dtype for each in formats.values() if each.activation is None}
    if dtype != "float32" and scales - {dtype}:
        other = (scales - {dtype}).pop()
        yield (
            f"the checkpoint's scales are {other} and the engine is {dtype}: they are kept as they are, but slower "
            f"kernels compute prompts; --dtype {other} has the faster ones"
        )


def cache_scale_warnings(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a warning if the checkpoint has scales of a cache, which are not used."""
    if checkpoint.has_cache_scales:
        yield (
            "the checkpoint has static scales of a key-value cache of 8 bits, which are not used: one scale for all "
            "tokens does not fit keys with large biases, such as Qwen2.5's. --kv-cache-dtype fp8 makes one for each "
            "token and head"
        )


def balance_keys(checkpoint: Checkpoint, model: ModelConfig, formats: Formats, kv_cache_dtype: str) -> list[str]:
    """Make the checkpoint's keys of similar size for an int8 cache; return a warning where that cannot be done."""
    if kv_cache_dtype != "int8" or not model.qkv_bias:
        return []
    factors, largest = key_factors(checkpoint, model, formats)
    checkpoint.scale_rows(factors)
    if not largest:
        return []
    return [
        f"keys have biases of up to {largest:.0f}, beside which an int8 cache rounds the other numbers of a head "
        "coarsely: --kv-cache-dtype fp8 is more exact"
    ]


def _generation_warnings(generation: GenerationConfig) -> Iterator[str]:
    if generation.left_out:
        yield f"ignored settings of generation_config.json, which are not supported: {', '.join(generation.left_out)}"


def _check_tokenizer(model_dir: Path) -> list[str]:
    """Return warnings about the checkpoint's tokenizer; raise QwenModelError if it cannot be loaded.

    Building needs no tokenizer: if its library is not installed, only generating with text fails.
    """
    library = "tokenizers" if (model_dir / TOKENIZER_JSON).is_file() else "tiktoken"
    if has_tokenizer(model_dir) and importlib.util.find_spec(library) is None:
        return []
    try:
        load_tokenizer(model_dir).check_chat_templates()
    except QwenModelError as error:
        if has_tokenizer(model_dir):
            raise
        return [f"the engine will take token ids only: {error}"]
    return []
