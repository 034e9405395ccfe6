"""Find the small trained model that comes with the package: a Hugging Face checkpoint in the shape of Qwen2.

It continues Python code and answers small questions about Python; it is there to try the package without a
download and to judge quantization by. ``docs/packaged_model.md`` says how it was made and how good it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def packaged_model_dir() -> Path:
    """Return the folder of the checkpoint."""
    return Path(__file__).parent / "data"


def held_out_text() -> str:
    """Return about 220 kB of Python sources that the model never saw, with ``<|endoftext|>`` around each file."""
    return (packaged_model_dir() / "held_out.txt").read_text(encoding="utf-8")


def training_record() -> dict[str, Any]:
    """Return how the model was made: sizes, recipe, seed, corpus, machine, loss curve and the perplexity reached."""
    return json.loads((packaged_model_dir() / "training.json").read_text(encoding="utf-8"))
