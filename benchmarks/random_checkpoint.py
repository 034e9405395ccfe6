"""Write a Hugging Face checkpoint with random weights in the shape of a published model, all layers or a few.

    python -m benchmarks.random_checkpoint --shape qwen-7b --layers 4 --output-dir checkpoint
    qwen-model build --model-dir checkpoint --backend tensorrt --output-dir engine

A layer of it takes as long as one of the real model. The weights are float16, or, with --format, those of linear layers
int4 in groups of 128, as GPTQ or compressed-tensors store them; the output projection stays float16. There is no
tokenizer. Needs safetensors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.generate import COMMON, SHAPES
from qwen_model.checkpoints.config import read_config
from qwen_model.checkpoints.weights import weight_groups
from qwen_model.quantization.options import QuantizationOptions
from qwen_model.quantization.published import FORMATS, quantization_config

NUMBERS = 1 << 22
"""How many numbers are drawn; weights repeat them, since drawing billions takes minutes."""
OPTIONS = QuantizationOptions("int4", head=None)
SCALE = np.float16(0.004)
"""Of int4: codes have a standard deviation of about 5, and weights one of 0.02."""
Array = npt.NDArray[Any]


class RandomNumbers:
    """RandomNumbers are drawn once; arrays begin at different places among them."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._floats = (generator.standard_normal(NUMBERS, np.float32) * 0.02).astype(np.float16)
        self._words = generator.integers(-(2**31), 2**31, NUMBERS, np.int32)
        self._count = 0

    def floats(self, *shape: int) -> Array:
        """Return float16 weights."""
        return self._repeated(self._floats, shape)

    def words(self, *shape: int) -> Array:
        """Return int32 words of codes."""
        return self._repeated(self._words, shape)

    def _repeated(self, numbers: Array, shape: tuple[int, ...]) -> Array:
        self._count += 1
        return np.resize(np.roll(numbers, -7919 * self._count % NUMBERS), shape)


def layer_tensors(stored_as: str, rows: int, columns: int, numbers: RandomNumbers) -> dict[str, Array]:
    """Return the tensors of an int4 layer by the last parts of their names."""
    groups = columns // OPTIONS.group_size
    if stored_as == "gptq":
        return {
            "qweight": numbers.words(columns // 8, rows),
            "qzeros": np.full((groups, rows // 8), 0x77777777, np.int32),  # of the first format: one less than 8
            "scales": np.full((groups, rows), SCALE),
            "g_idx": np.arange(columns, dtype=np.int32) // OPTIONS.group_size,
        }
    return {
        "weight_packed": numbers.words(rows, columns // 8),
        "weight_scale": np.full((rows, groups), SCALE),
        "weight_shape": np.array((rows, columns), np.int64),
    }


def tensors(values: dict[str, Any], stored_as: str | None) -> Iterator[tuple[str, Array]]:
    """Yield the names and tensors of a checkpoint."""
    numbers = RandomNumbers()
    for group in weight_groups(read_config(values), "float16"):
        for source in (source for spec in group.specs for source in spec.sources):
            if len(source.shape) == 1:
                yield source.name, np.ones(source.shape, np.float16)
            elif stored_as is None or not source.name.endswith("_proj.weight"):
                yield source.name, numbers.floats(*source.shape)
            else:
                layer = source.name.removesuffix(".weight")
                rows, columns = source.shape
                for name, tensor in layer_tensors(stored_as, rows, columns, numbers).items():
                    yield f"{layer}.{name}", tensor


def write_checkpoint(folder: Path, values: dict[str, Any], stored_as: str | None = None) -> int:
    """Write a checkpoint of a config.json's values into a new folder, and return the bytes of its tensors.

    stored_as: of `quantization.published.FORMATS`; None: the weights are float16.
    """
    from safetensors.numpy import save_file

    found = dict(tensors(values, stored_as))
    folder.mkdir(parents=True)
    save_file(found, folder / "model.safetensors")
    quantized = {} if stored_as is None else {"quantization_config": quantization_config(stored_as, OPTIONS)}
    (folder / "config.json").write_text(json.dumps({**values, "torch_dtype": "float16", **quantized}, indent=1))
    return sum(tensor.nbytes for tensor in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen-7b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--vocab-size", type=int, help="default: the model's")
    parser.add_argument("--format", choices=FORMATS, help="of int4 layers (default: float16)")
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    values = {**COMMON, **SHAPES[options.shape]}
    values["num_hidden_layers"] = options.layers or values["num_hidden_layers"]
    values["vocab_size"] = options.vocab_size or values["vocab_size"]
    size = write_checkpoint(options.output_dir, values, options.format)
    print(f"{options.output_dir}: {values['num_hidden_layers']} layers, {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
