"""Calibrate quantization on texts: what the network does with them says how its layers are quantized best."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import ModelConfig
from ..checkpoints.module_weights import Formats
from ..checkpoints.tokenizer import Tokenizer, load_tokenizer
from ..common.errors import QwenModelError
from ..common.files import parse_json_object, read_text
from ..common.progress import Progress
from ..packaged_model import held_out_text
from ..quantization.activation_aware import CalibratedWeights, find_input_scales
from ..quantization.options import QuantizationOptions
from ..quantization.smoothing import calibrate_inputs

PIECE_TOKENS, PIECES, LEAST_TOKENS = 512, 64, 256
"""The tokens of a piece of the texts, the most whole pieces that are used, and the least tokens that are enough."""
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def calibrated_weights(
    checkpoint: Checkpoint,
    model: ModelConfig,
    formats: Formats,
    options: QuantizationOptions,
    activation_aware: bool,
    calibration: str | os.PathLike[str] | None,
    progress: Progress,
) -> CalibratedWeights | None:
    """Run the network over texts, and return its weights with what was found folded in; None: nothing has to be found.

    activation_aware: see `build_engine`.
    calibration: a UTF-8 file like what the model is for, a text a line, or JSONL: a {"messages": [...]}, which the
        chat template writes, or a {"text": "..."} a line. Of more than `PIECES` pieces, some from everywhere are taken.
        None: the packaged model's held-out text.

    Raises:
        QwenModelError: the file cannot be read or is too short, or the checkpoint has no tokenizer.
    """
    if not activation_aware and not needs_calibration(options):
        return None
    tokenizer = load_tokenizer(checkpoint.model_dir)
    pieces = calibration_pieces(tokenizer, calibration, min(PIECE_TOKENS, model.max_positions))
    if activation_aware:
        found = find_input_scales(checkpoint, model, formats, pieces, progress)
    else:
        found = calibrate_inputs(checkpoint, model, formats, options, pieces, progress)
    return CalibratedWeights(checkpoint, model, found)


def needs_calibration(options: QuantizationOptions) -> bool:
    """Tell whether layers have static scales of their inputs, or are smoothed."""
    smoothed = options.kind == "smoothquant" and options.alpha != "none"
    return options.quantizes_x and (smoothed or not options.per_token)


def calibration_warnings(options: QuantizationOptions, activation_aware: bool, calibration: object) -> list[str]:
    """Return a warning if texts are needed and none are given."""
    if calibration is not None or not (activation_aware or needs_calibration(options)):
        return []
    return [
        "calibrated on the packaged model's held-out text, Python sources: give texts like those that the model is "
        "for (--calibration FILE)"
    ]


def calibration_pieces(tokenizer: Tokenizer, calibration: str | os.PathLike[str] | None, size: int) -> list[list[int]]:
    """Return the tokens of texts in pieces of at most `size`, `PIECES` whole ones together; see `calibrated_weights`.

    Raises:
        QwenModelError: the file cannot be read, is damaged or too short.
    """
    text = held_out_text() if calibration is None else read_text(Path(calibration))
    start = tokenizer.encode("")  # LLaMA's <s>; Qwen begins with nothing
    if calibration is not None and _is_json_lines(Path(calibration), text):
        pieces = [tokens[:size] for tokens in _json_texts(tokenizer, Path(calibration), text) if tokens]
    else:
        lines = (tokenizer.encode(line, add_special_tokens=False) for line in text.splitlines(keepends=True))
        pieces = [start + piece for piece in _packed(lines, size - len(start))]
    total = sum(map(len, pieces))
    if total < LEAST_TOKENS:
        raise QwenModelError(
            f"a text to calibrate on needs at least {LEAST_TOKENS} tokens, and {calibration} has {total}"
        )
    return pieces[:: -(-total // (PIECES * size))]


def _is_json_lines(path: Path, text: str) -> bool:
    """Tell whether a file has an object a line: by its name, or as its first line looks."""
    return path.suffix in JSON_SUFFIXES or text.lstrip().startswith(('{"messages"', '{"text"'))


def _json_texts(tokenizer: Tokenizer, path: Path, text: str) -> Iterator[list[int]]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028 and U+0085
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        values = parse_json_object(line, where)
        messages, plain = values.get("messages"), values.get("text")
        try:
            if isinstance(messages, list):
                yield tokenizer.apply_chat_template(messages, add_generation_prompt=False)
                continue
            if isinstance(plain, str):
                yield tokenizer.encode(plain)
                continue
        except QwenModelError as error:
            raise QwenModelError(f"{where}: {error}") from error
        raise QwenModelError(f'{where} must have "messages", a list, or "text", a text')


def _packed(texts: Iterator[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Put short texts one after the other into pieces of `size` tokens, and cut long ones to pieces."""
    piece: list[int] = []
    for text in texts:
        piece += text
        while len(piece) >= size:
            yield piece[:size]
            piece = piece[size:]
    if piece:
        yield piece
