"""Measure the perplexity of the packaged model in every quantization, also with outliers put into it.

    python -m benchmarks.quantization [--characters 40000] [--device cpu]

Large models have channels whose activations are a hundred times larger than others. The packaged model is too small for
that, so it is also measured with some put in that change nothing of its function: norm weights are multiplied by up to
100, and the columns behind them divided by as much. Calibration is on the first quarter of the held-out text, the
perplexity on tokens of the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, require_torch, write_results

METHODS: dict[str, dict[str, Any]] = {
    "not quantized": {},
    "int8": {"quantization": "int8"},
    "int4, groups of 128": {"quantization": "int4"},
    "int4, groups of 128, zero points": {"quantization": "int4", "symmetric": False},
    "int4, groups of 32": {"quantization": "int4", "group_size": 32},
    "int4, one group": {"quantization": "int4", "group_size": -1},
    "int4, groups of 128, activation-aware": {"quantization": "int4", "activation_aware": True},
    "int4, groups of 128, zero points, activation-aware": {
        "quantization": "int4",
        "symmetric": False,
        "activation_aware": True,
    },
}
OUTLIER_CHANNELS, LARGEST_OUTLIER = 8, 100.0


def with_outliers(source: Path, folder: Path, seed: int = 0) -> Path:
    """Write the packaged model with outlier channels behind every norm of its layers; its function is the same."""
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    behind = {"input_layernorm": ("self_attn", "qkv"), "post_attention_layernorm": ("mlp", ("gate", "up"))}
    rng = np.random.default_rng(seed)
    for name in [name for name in tensors if name.split(".")[-2] in behind]:
        layer, norm, _ = name.rsplit(".", 2)
        parent, projections = behind[norm]
        scales = torch.ones(len(tensors[name]))
        places = rng.choice(len(scales), OUTLIER_CHANNELS, replace=False)
        scales[places] = torch.from_numpy(np.geomspace(4.0, LARGEST_OUTLIER, OUTLIER_CHANNELS)).float()
        tensors[name] = tensors[name] * scales
        for projection in projections:
            weight = f"{layer}.{parent}.{projection}_proj.weight"
            tensors[weight] = tensors[weight] / scales
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}), encoding="utf-8")
    return folder


def measure(model_dir: Path, work: Path, options: Mapping[str, Any], text: str, device: str) -> dict[str, float]:
    """Return perplexity, bits of a quantized weight, and megabytes of an engine of the model."""
    import qwen_model
    from qwen_model.evaluation.perplexity import measure_perplexity

    calibration: dict[str, Any] = {"calibration": work / "calibration.txt"} if "activation_aware" in options else {}
    summary = qwen_model.build_engine(
        model_dir, output_dir=work / "engine", dtype="float32", max_batch_size=1, **options, **calibration
    )
    found = measure_perplexity(qwen_model.load_engine(work / "engine", device=device), text)
    return {
        "perplexity": found.per_token,
        "tokens": found.tokens,
        "bits": summary.weights.bits or 32.0,
        "megabytes": summary.weight_bytes / 1e6,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=40_000, help="of the text (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantization.json")
    options = parser.parse_args()
    require_torch()
    from qwen_model.packaged_model import held_out_text, packaged_model_dir

    text = held_out_text()
    quarter = len(text) // 4
    evaluated = text[2 * quarter : 2 * quarter + options.characters]
    records = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "calibration.txt").write_text(text[:quarter], encoding="utf-8")
        outliers = with_outliers(packaged_model_dir(), work / "outliers")
        models = {"as packaged": packaged_model_dir(), "with outliers": outliers}
        for name, method in METHODS.items():
            for model, model_dir in models.items():
                found = measure(model_dir, work, method, evaluated, options.device)
                records.append({"method": name, "model": model, **found})
                print(f"{name}, {model}: {found['perplexity']:.4f}, {found['bits']:.2f} bits", flush=True)
    write_results(options.output, records)


if __name__ == "__main__":
    main()
