"""Calibrate activation-aware quantization on a text."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import Formats
from ..checkpoints.tokenizer import load_tokenizer
from ..common.errors import QwenModelError
from ..common.files import read_text
from ..common.progress import Progress
from ..packaged_model import held_out_text
from ..quantization.activation_aware import CalibratedWeights, find_input_scales

PIECE_TOKENS, PIECES, LEAST_TOKENS = 512, 32, 256
"""The tokens of a piece of the text, the most pieces that are used, and the least tokens that a text must have."""


def calibrated_weights(
    checkpoint: Checkpoint,
    model: ModelConfig,
    formats: Formats,
    calibration: str | os.PathLike[str] | None,
    progress: Progress,
) -> CalibratedWeights:
    """Search the input scales of the layers that are quantized, and return the weights with these folded in.

    calibration: a UTF-8 file of text like that which the model is for, of which pieces from everywhere are taken;
        None: the packaged model's held-out text.

    Raises:
        QwenModelError: the file cannot be read or is too short, or the checkpoint has no tokenizer.
    """
    text = held_out_text() if calibration is None else read_text(Path(calibration))
    tokens = load_tokenizer(checkpoint.model_dir).encode(text)
    if len(tokens) < LEAST_TOKENS:
        raise QwenModelError(
            f"a text to calibrate on needs at least {LEAST_TOKENS} tokens, and {calibration} has {len(tokens)}"
        )
    size = min(PIECE_TOKENS, model.max_positions)
    starts = range(0, len(tokens), size)
    pieces = [tokens[start : start + size] for start in starts[:: max(1, len(starts) // PIECES)]][:PIECES]
    return CalibratedWeights(checkpoint, model, find_input_scales(checkpoint, model, formats, pieces, progress))
