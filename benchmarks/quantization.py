"""Measure what each quantization does to the packaged model, also with outliers put into it.

    python -m benchmarks.quantization [--tokens 4096] [--device cpu]

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import RESULTS, require_torch, write_results

if TYPE_CHECKING:
    from qwen_model.engine.session import Session

Floats = npt.NDArray[np.float32]

WINDOW = 512
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


def next_token_logits(session: Session, tokens: Sequence[int]) -> Floats:
    """Return the log-probabilities after each token but the last, in windows that do not see one another."""
    windows = [tokens[start : start + WINDOW + 1] for start in range(0, len(tokens) - 1, WINDOW)]
    logits = np.concatenate([session.logits(window[:-1]) for window in windows]).astype(np.float32)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def measure(
    model_dir: Path, work: Path, method: Mapping[str, Any], tokens: int, device: str, reference: Floats | None
) -> tuple[dict[str, float], Floats]:
    """Return what an engine of the model has, and its log-probabilities; reference: those of one not quantized."""
    import qwen_model
    from qwen_model.packaged_model import held_out_text

    text = held_out_text()
    (work / "calibration.txt").write_text(text[: len(text) // 8], encoding="utf-8")
    calibration: dict[str, Any] = {"calibration": work / "calibration.txt"} if "activation_aware" in method else {}
    summary = qwen_model.build_engine(
        model_dir, output_dir=work / "engine", dtype="float32", max_batch_size=1, **method, **calibration
    )
    session = qwen_model.load_engine(work / "engine", device=device)
    assert session.tokenizer is not None
    ids = session.tokenizer.encode(text[len(text) // 2 :])[: tokens + 1]
    found = next_token_logits(session, ids)
    nats = -found[np.arange(len(found)), ids[1:]].mean(dtype=np.float64)
    record = {"perplexity": float(np.exp(nats)), "tokens": len(found), "bits": summary.weights.bits or 32.0}
    record["megabytes"] = summary.weight_bytes / 1e6
    if reference is not None:
        record["divergence"] = float((np.exp(reference) * (reference - found)).sum(axis=1).mean(dtype=np.float64))
    return record, found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="that are predicted (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantization.json")
    options = parser.parse_args()
    require_torch()
    from qwen_model.packaged_model import packaged_model_dir

    records = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        outliers = with_outliers(packaged_model_dir(), work / "outliers")
        for model, model_dir in {"as packaged": packaged_model_dir(), "with outliers": outliers}.items():
            reference = None
            for name, method in METHODS.items():
                record, found = measure(model_dir, work, method, options.tokens, options.device, reference)
                reference = found if reference is None else reference
                records.append({"method": name, "model": model, **record})
                print(name, model, {key: round(value, 5) for key, value in record.items()}, sep=", ", flush=True)
    write_results(options.output, records)


if __name__ == "__main__":
    main()
