"""Compare an engine with a reference, operation by operation and end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...checkpoints.config import ModelConfig
from ...checkpoints.quantization_config import read_quantization
from ...common.errors import QwenModelError
from ...common.files import read_json_object
from ...common.progress import Progress, no_progress
from ...engine.back_ends import back_end
from ...interface.device import Batch, Device
from ...interface.engine_config import EngineConfig
from ...interface.probe import Array, Probe
from .diagnosis import likely_reason
from .errors import LIMIT, ROUNDING, Error, error_of
from .passes import chained_errors, isolated_errors
from .reference import (
    CheckpointModules,
    Finding,
    Passes,
    ReadArrays,
    Reference,
    StepErrors,
    result_names,
    samples_of,
)


@dataclass(frozen=True)
class Comparison:
    """Hold what was found.

    passes: the errors of the engine's operations.
    finding: the first operation that is off; None: none is.
    logits: the error of the engine's own logits after the prompt, without any observation.
    """

    engine_dir: str
    config: EngineConfig
    reference: Reference
    passes: Passes
    finding: Finding | None
    logits: Error

    @property
    def own(self) -> Passes:
        """Return the errors of PyTorch's own operations in the engine's type."""
        return self.reference.own[self.config.dtype]

    @property
    def logits_ratio(self) -> float:
        """Divide the error of the engine's own logits by the larger of those of both passes end to end."""
        ends = [passes.chained[0]["lm_head"] for passes in (self.own, self.passes)]
        return min(self.logits.ratio(end, self.config.dtype) for end in ends)

    @property
    def passed(self) -> bool:
        """Tell whether nothing is off, in the engine or between the original and our network."""
        return self.finding is None and self.reference.difference is None and self.logits_ratio <= LIMIT


def compare_engine(
    engine_dir: Path,
    reference: Reference,
    model_dir: Path | None = None,
    device: str | None = None,
    progress: Progress = no_progress,
) -> Comparison:
    """Run an engine beside a reference.

    model_dir: the checkpoint; a TensorRT engine needs it, since its plan shows no results but the last. None: faults
        are looked for with the engine's own weights.
    progress: called with a phase, and the number of steps done and in all.

    Raises:
        QwenModelError: the engine cannot run here or the reference is of another model, type or length.
    """
    config = EngineConfig.read(engine_dir)
    check_engine(config, reference.model, len(reference.prompt), len(reference.output))
    if config.dtype not in reference.own:
        raise QwenModelError(f"the reference has no errors of PyTorch in {config.dtype}, the engine's type")
    loaded = back_end(config.backend)
    checkpoint = None if model_dir is None else CheckpointModules(model_dir, config.model, loaded.FRAMEWORK)
    progress("the engine's logits", 0, 0)
    logits = _prompt_logits(loaded.load_device(engine_dir, config, device, progress=progress), reference.prompt)
    read_weight = None if checkpoint is None else checkpoint.of_engine(config)
    # Quantized weights are not those of the checkpoint: faults are looked for with the engine's own.
    read_module = None if checkpoint is None or config.weight_formats else checkpoint.arrays
    probe = loaded.load_probe(engine_dir, config, device, read_weight, progress)
    passes, finding = compare_probe(probe, reference, config.dtype, read_module, progress)
    error = error_of(logits, reference.values[0]["lm_head"])
    return Comparison(str(engine_dir), config, reference, passes, finding, error)


def _prompt_logits(device: Device, prompt: Sequence[int]) -> Array:
    """Return the logits after each token of a prompt, which runs in slot 0: [tokens, vocab_size]."""
    pages = np.arange(1, -(-len(prompt) // device.page_size) + 1, dtype=np.int32)[None]
    found = []
    for past in range(0, len(prompt), device.max_logit_rows):
        tokens = np.array(prompt[past : past + device.max_logit_rows], np.int32)
        slot, length, before, whole = np.array([0, len(tokens), past, len(prompt)], np.int32).reshape(4, 1)
        batch = Batch(tokens, slot, length, before, whole, pages, chooses=np.array([False]))
        found.append(device.logits(batch, np.arange(len(tokens), dtype=np.int32)))
    return np.concatenate(found)


def compare_probe(
    probe: Probe,
    reference: Reference,
    dtype: str,
    read: ReadArrays | None = None,
    progress: Progress = no_progress,
) -> tuple[Passes, Finding | None]:
    """Run both passes of a network of this type; return the errors, and the first operation that is off.

    read: the checkpoint's weights; None: the network's own.

    Raises:
        QwenModelError: the weights are not those of the reference.
    """
    readers = [probe.module] if read is None else [read, probe.module]
    _check_samples(reference, readers[0], dtype)
    finding: Finding | None = None

    def inspect(step: int, found: Mapping[str, Array], errors: StepErrors) -> None:
        nonlocal finding
        progress("each operation", step + 1, len(reference.steps))
        finding = finding or _first_off(reference, step, found, errors, dtype, readers)

    progress("each operation", 0, len(reference.steps))
    isolated = isolated_errors(reference, probe, inspect)
    progress("end to end", 0, 0)
    return Passes(isolated, chained_errors(reference, probe)), finding


def _first_off(
    reference: Reference,
    step: int,
    found: Mapping[str, Array],
    errors: StepErrors,
    dtype: str,
    readers: Sequence[ReadArrays],
) -> Finding | None:
    own = reference.own[dtype].isolated[step]
    for name in result_names(reference.model):
        if name not in errors:
            continue
        ratio = errors[name].ratio(own[name], dtype)
        if ratio > LIMIT:
            cases = [reference.case(name, step, read) for read in readers]
            reason = likely_reason(cases, found, own, dtype)
            return Finding(name, step, errors[name], ratio, reason)
    return None


def check_engine(config: EngineConfig, model: ModelConfig, prompt_length: int, num_steps: int) -> None:
    """Check that an engine is of a model, shows its errors, and takes this prompt and so many decode steps.

    Raises:
        QwenModelError: it is not, or does not.
    """
    ours, theirs = _described(config.model), _described(model)
    for name, value in ours.items():
        if theirs[name] != value:
            raise QwenModelError(
                f"the engine is of another model than the reference: its {name} is {value}, not {theirs[name]}"
            )
    limits = config.limits
    if prompt_length > limits.max_input_len or prompt_length + num_steps > limits.max_positions:
        raise QwenModelError(
            f"a prompt of {prompt_length} tokens and {num_steps} steps exceed the engine's {limits.max_input_len} "
            f"tokens of input and {limits.max_output_len} of output"
        )
    if prompt_length > limits.step_tokens:
        raise QwenModelError(
            f"a prompt of {prompt_length} tokens is more than the engine's steps of {limits.step_tokens}"
        )
    if config.kv_cache_dtype != "auto":
        raise QwenModelError(
            f"the engine's key-value cache has {config.kv_cache_dtype}, beside whose error no other would be seen: "
            "compare one built without --kv-cache-dtype"
        )
    quantized = [each for each in config.weight_formats.values() if each.activation is not None]
    if quantized:
        raise QwenModelError(
            f"the engine's linear layers quantize what they read ({quantized[0].text}), beside whose error no other "
            "would be seen: compare one built with --quantization none"
        )


def check_quantization(config: EngineConfig, model_dir: Path) -> None:
    """Check that a checkpoint has the weights quantized that an engine has, or else they are others.

    Raises:
        QwenModelError: it has none quantized, or `build` quantized the engine's output projection.
    """
    if config.weight_formats and read_quantization(model_dir, read_json_object(model_dir / "config.json")) is None:
        quantized = next(iter(config.weight_formats.values()))
        raise QwenModelError(
            f"the engine's weights are quantized ({quantized.text}), and those of {model_dir} are not: compare an "
            "engine built with --quantization none, or one of a checkpoint that qwen-model quantize wrote"
        )
    given = dict(zip(config.quantization_options, config.quantization_options[1:], strict=False))
    if given.get("--head-quantization", "none") != "none":
        raise QwenModelError(
            f"the engine's output projection was quantized by build, and that of {model_dir} is another: compare an "
            "engine built without --head-quantization"
        )


def _described(model: ModelConfig) -> dict[str, object]:
    """Return what results depend on."""
    return {name: value for name, value in dataclasses.asdict(model).items() if name != "dtype"}


def _check_samples(reference: Reference, read: ReadArrays, dtype: str) -> None:
    """Check that weights are those of the reference; one that is wrong in a few modules is a fault to be found."""
    found = samples_of(reference.model, read)
    close = 2 * ROUNDING[dtype]
    other = [name for name, x in found.items() if not np.allclose(x, reference.samples[name], close, 1e-6)]
    if len(other) > len(found) / 2:
        raise QwenModelError(
            f"the reference is of other weights: those of {other[0]} and {len(other) - 1} more modules differ; an "
            "engine with quantized weights needs a reference of the quantized checkpoint"
        )


def check_prompt(reference: Reference, prompt: Sequence[int] | None, num_steps: int | None) -> None:
    """Check that a reference is for this prompt and number of steps; None: not given.

    Raises:
        QwenModelError: it is for others.
    """
    if prompt is not None and list(prompt) != reference.prompt:
        raise QwenModelError(
            f"the reference is of another prompt: {len(reference.prompt)} tokens, {reference.prompt[:6]}...; leave the "
            "prompt out, or make a reference for it"
        )
    if num_steps is not None and num_steps != len(reference.output):
        raise QwenModelError(f"the reference has {len(reference.output)} decode steps, not {num_steps}")
