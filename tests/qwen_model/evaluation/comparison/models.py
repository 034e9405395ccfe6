"""Small random checkpoints, and engines of the torch back end on the CPU whose operations can be made wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import qwen_model
from qwen_model.backends.torch.back_end import load_device
from qwen_model.backends.torch.operations import TorchOperations
from qwen_model.interface.engine_config import EngineConfig
from tests.qwen_model import model_files

LIMITS = {"max_batch_size": 2, "max_input_len": 40, "max_output_len": 24}


def save_model(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    if architecture == "QWenLMHeadModel":
        model, config = model_files.qwen_v1(seed, **{"seq_length": 16, **changes})
        return model_files.save_reference(model, config, folder)
    if architecture == "DeciCoderForCausalLM":
        model, config = model_files.decicoder(seed, **changes)
        return model_files.save_reference(model, config, folder)
    return model_files.save_hugging_face(model_files.hugging_face_model(architecture, seed, **changes), folder)


def save_engine(model_dir: Path | None, folder: Path, dtype: str, **options: Any) -> Path:
    qwen_model.build_engine(model_dir, output_dir=folder, dtype=dtype, **{**LIMITS, **options})
    return folder


def device_with(engine_dir: Path, operations: type[TorchOperations], **options: Any) -> Any:
    """An engine's device that computes with operations of this class."""
    device: Any = load_device(engine_dir, EngineConfig.read(engine_dir), "cpu")
    right = device.operations
    device.operations = operations(right.config, dict(right.modules), device.cache, ("rms_norm",), **options)
    return device
