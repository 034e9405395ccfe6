"""Measure what each quantization does to the packaged model, also with outliers put into it.

    python -m benchmarks.quantization [--tokens 4096] [--device cpu] [--dtype float32] [--methods smoothquant fp8]

Large models have channels whose activations are a hundred times larger than others. The packaged model is too small for
that, so it is also measured with some put in that change nothing of its function: norm weights are multiplied by up to
100, and the columns behind them divided by as much. Calibration is on the first eighth of the held-out text. On tokens
of its second half the perplexity is measured, and the Kullback-Leibler divergence of the next token from the model that
is not quantized.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, require_torch, write_results

WINDOW = 512
MODELS = ("as packaged", "with outliers")
PLAIN = "not quantized"
METHODS: dict[str, dict[str, Any]] = {
    PLAIN: {},
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
    "smoothquant, not smoothed": {"quantization": "smoothquant", "alpha": "none"},
    "smoothquant": {"quantization": "smoothquant"},
    "smoothquant, alpha auto": {"quantization": "smoothquant", "alpha": "auto"},
    "smoothquant, per channel, alpha auto": {"quantization": "smoothquant", "per_channel": True, "alpha": "auto"},
    "smoothquant, per token and channel, not smoothed": {
        "quantization": "smoothquant",
        "per_token": True,
        "per_channel": True,
        "alpha": "none",
    },
    "smoothquant, per token and channel": {"quantization": "smoothquant", "per_token": True, "per_channel": True},
    "fp8, calibrated": {"quantization": "fp8", "calibrated": True},
    "fp8, per token": {"quantization": "fp8"},
}
OUTLIER_CHANNELS, LARGEST_OUTLIER = 8, 100.0


def with_outliers(source: Path, folder: Path, seed: int = 0) -> Path:
    """Write the packaged model with outlier channels behind every norm of its layers; its function is the same."""
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


def measure(
    model_dir: Path, work: Path, methods: Mapping[str, Mapping[str, Any]], tokens: int, device: str, dtype: str
) -> Iterator[dict[str, Any]]:
    """Yield what an engine of the model has with each method; the divergence is from the first."""
    import qwen_model
    from qwen_model.evaluation.divergence import compare_predictions
    from qwen_model.packaged_model import held_out_text

    text = held_out_text()
    (work / "calibration.txt").write_text(text[: len(text) // 8], encoding="utf-8")
    summaries = {}
    for name, options in methods.items():
        method = dict(options)
        calibrated = method.pop("calibrated", False) or "activation_aware" in method
        smoothed = method.get("quantization") == "smoothquant" and not (
            method.get("per_token") and method.get("alpha") == "none"
        )
        if calibrated or smoothed:
            method["calibration"] = work / "calibration.txt"
        summaries[name] = qwen_model.build_engine(
            model_dir, output_dir=work / name, dtype=dtype, max_batch_size=1, **method
        )

    def load(engine: str) -> qwen_model.Session:
        return qwen_model.load_engine(engine, device=device)

    engines = [str(work / name) for name in methods]
    found = compare_predictions(engines, load, text[len(text) // 2 :], WINDOW, tokens)
    for (name, summary), prediction in zip(summaries.items(), found, strict=True):
        yield {
            "method": name,
            "perplexity": prediction.perplexity,
            "tokens": prediction.tokens,
            "divergence": prediction.mean_divergence,
            "largest_divergence": prediction.largest_divergence,
            "same_token": prediction.same_token,
            "bits": summary.weights.bits or 32.0,
            "megabytes": summary.weight_bytes / 1e6,
        }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="that are predicted (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the engines (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=[""], help="beginnings of the names of methods (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantization.json")
    options = parser.parse_args()
    require_torch()
    from qwen_model.packaged_model import packaged_model_dir

    methods = {name: how for name, how in METHODS.items() if name.startswith((PLAIN, *options.methods))}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        outliers = with_outliers(packaged_model_dir(), Path(folder) / "outliers")
        for model, model_dir in zip(MODELS, (packaged_model_dir(), outliers), strict=True):
            if model not in options.models:
                continue
            work = Path(folder) / model
            work.mkdir()
            for record in measure(model_dir, work, methods, options.tokens, options.device, options.dtype):
                records.append({"model": model, **record})
                print({key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()})
    write_results(options.output, records)


if __name__ == "__main__":
    main()
