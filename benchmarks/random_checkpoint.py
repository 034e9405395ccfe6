"""Write a Hugging Face checkpoint with random weights in the shape of a published model, all layers or a few.

    python -m benchmarks.random_checkpoint --shape qwen-7b --layers 4 --output-dir checkpoint
    qwen-model build --model-dir checkpoint --backend tensorrt --output-dir engine

A layer of it takes as long as one of the real model. The weights are float16; there is no tokenizer. Needs safetensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.generate import COMMON, SHAPES
from qwen_model.checkpoints.config import read_config
from qwen_model.checkpoints.weights import weight_groups

NUMBERS = 1 << 22
"""How many numbers are drawn; weights repeat them, since drawing billions takes minutes."""


def random_weight(shape: tuple[int, ...], numbers: npt.NDArray[np.float16], start: int) -> npt.NDArray[np.float16]:
    """Return a matrix of the random numbers from `start` on, again and again; or ones, for a norm."""
    if len(shape) == 1:
        return np.ones(shape, np.float16)
    return np.resize(np.roll(numbers, -start), shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen-7b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--vocab-size", type=int, help="default: the model's")
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    from safetensors.numpy import save_file

    values = {**COMMON, **SHAPES[options.shape], "torch_dtype": "float16"}
    values["num_hidden_layers"] = options.layers or values["num_hidden_layers"]
    values["vocab_size"] = options.vocab_size or values["vocab_size"]
    numbers = (np.random.default_rng(0).standard_normal(NUMBERS, np.float32) * 0.02).astype(np.float16)
    groups = weight_groups(read_config(values), "float16")
    sources = [source for group in groups for spec in group.specs for source in spec.sources]
    weights = {
        source.name: random_weight(source.shape, numbers, 7919 * index % NUMBERS)
        for index, source in enumerate(sources)
    }
    options.output_dir.mkdir(parents=True)
    save_file(weights, options.output_dir / "model.safetensors")
    (options.output_dir / "config.json").write_text(json.dumps(values, indent=1))
    size = sum(weight.nbytes for weight in weights.values())
    print(f"{options.output_dir}: {values['num_hidden_layers']} layers, {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
