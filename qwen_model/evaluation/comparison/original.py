"""Run the original network, that of transformers, in float64, and record what its modules compute.

The weights stay in the checkpoint's type; each module's are widened while it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.architectures import ARCHITECTURES
from ...checkpoints.config import ModelConfig
from ...common.errors import QwenModelError
from ...interface.probe import Array
from ..original import one_line_errors

ATTENTION = "qwen_model_compare"
"""The name under which our attention function is registered with transformers."""


def find_original(architecture: str) -> str | None:
    """Return name and version of the network in transformers; None: transformers, or the network in it, is missing."""
    try:
        import transformers
    except ImportError:
        return None
    if not hasattr(transformers, architecture):
        return None
    return f"{architecture} of transformers {transformers.__version__}"


class OriginalNetwork:
    """Run one sequence through the network of transformers."""

    def __init__(self, model_dir: Path, config: ModelConfig):
        """Load a checkpoint that `find_original` has a network for.

        Raises:
            QwenModelError: transformers cannot load it, or its modules are not those of the architecture's table.
        """
        import transformers

        self._config = config
        self._values: dict[str, Tensor] = {}
        self._cache: Any = None
        self._register()
        with one_line_errors(str(model_dir)), _quiet():
            self._model = getattr(transformers, config.architecture).from_pretrained(
                model_dir, dtype="auto", attn_implementation=ATTENTION, local_files_only=True
            )
        self._model.eval()
        for module in self._model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                _widen_while_it_runs(module)
        self._record()

    @torch.inference_mode()
    def run(self, tokens: Sequence[int], past: int) -> dict[str, Array]:
        """Return the results of each operation as `Probe.run` does, float64, without those that are not seen."""
        if past == 0:
            self._cache = None
        self._values.clear()
        with _quiet():
            found = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True)
            self._cache = found.past_key_values
        rows = len(tokens)
        return {name: value.reshape(rows, -1).double().numpy() for name, value in self._values.items()}

    def _register(self) -> None:
        """Make transformers call our attention function, with the masks of its own."""
        try:
            from transformers import AttentionInterface
            from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        except ImportError as error:
            raise QwenModelError(f"compare needs transformers 4.57 or later ({error})") from error
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)

    def _record(self) -> None:
        """Record inputs and outputs of the modules that the architecture's table names.

        A norm's result is what the linear layer after it reads, and a sum with the residual is what a layer or a norm
        reads: so what is recorded is right even if the table calls a norm by the name of another.
        """
        config, names = self._config, ARCHITECTURES[self._config.architecture].weights
        self._record_output(names.embedding, "embedding")
        for layer in range(config.num_layers):
            prefix, ours = names.layer.format(layer=layer), f"layers.{layer}"
            if layer > 0:
                self._record_input(prefix, f"{ours}.input_norm.residual")
            self._record_input(f"{prefix}.{names.qkv[0]}", f"{ours}.input_norm")
            self._record_joined([f"{prefix}.{name}" for name in names.qkv], f"{ours}.attention.qkv")
            self._record_input(f"{prefix}.{names.attention_output}", f"{ours}.attention")
            self._record_output(f"{prefix}.{names.attention_output}", f"{ours}.attention.output")
            self._record_input(f"{prefix}.{names.post_attention_norm}", f"{ours}.post_attention_norm.residual")
            self._record_input(f"{prefix}.{names.gate}", f"{ours}.post_attention_norm")
            self._record_input(f"{prefix}.{names.down}", f"{ours}.mlp.gate_up")
            self._record_output(f"{prefix}.{names.down}", f"{ours}.mlp.down")
        self._record_input(names.final_norm, "final_norm.residual")
        self._record_input(names.lm_head, "final_norm")
        self._record_output(names.lm_head, "lm_head")

    def _record_input(self, module: str, name: str) -> None:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], keywords: Mapping[str, Any]) -> None:
            self._values[name] = inputs[0] if inputs else keywords["hidden_states"]

        self._module(module).register_forward_pre_hook(record, with_kwargs=True)

    def _record_output(self, module: str, name: str) -> None:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._values[name] = output

        self._module(module).register_forward_hook(record)

    def _record_joined(self, modules: Sequence[str], name: str) -> None:
        """Record the outputs of several modules, which run one after the other, side by side."""
        parts: list[Tensor] = []

        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            parts.append(output)
            if len(parts) == len(modules):
                self._values[name] = torch.cat(parts, dim=-1)
                parts.clear()

        for module in modules:
            self._module(module).register_forward_hook(record)

    def _module(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError as error:
            raise QwenModelError(
                f"{self._config.architecture} of transformers has no module {name}, which architectures.py names"
            ) from error

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Record [1, heads, tokens, head_size] of each after the rotary embedding, and attend as transformers does."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        rows = query.shape[2]
        for name, heads in (("q", query), ("k", key), ("v", value)):
            recorded = heads[0, :, -rows:].transpose(0, 1).flatten(1)
            self._values[f"layers.{module.layer_idx}.attention.{name}"] = recorded
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and from warning, such as of names that later versions change."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _widen_while_it_runs(module: nn.Module) -> None:
    """Make a module's own parameters float64 before each call, and what they were after it; both are exact."""
    stored = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}

    def widen(called: nn.Module, inputs: Any) -> None:
        for name, parameter in called.named_parameters(recurse=False):
            parameter.data = stored[name].double()

    def restore(called: nn.Module, inputs: Any, output: Any) -> None:
        for name, parameter in called.named_parameters(recurse=False):
            parameter.data = stored[name]

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore)
