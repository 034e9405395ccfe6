"""Checkpoints of every architecture, exported networks, and the torch back end's results, for test_tensorrt_gpu.py.

    python -m tests.qwen_model.tensorrt_reference FOLDER [--device cuda] [--dtypes float32 float16]

TensorRT and PyTorch need not be on one machine, nor in one Python: the test reads FOLDER, named in the environment
variable QWEN_MODEL_REFERENCE.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import qwen_model
from qwen_model.engine.export import export_onnx
from tests.qwen_model.backends.device_runs import Running, batch_of

ARCHITECTURES = [
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "LlamaForCausalLM",
    "DeciCoderForCausalLM",
]
LIMITS = {"max_batch_size": 6, "max_input_len": 80, "max_output_len": 65}
QUANTIZED = {
    "int4": {"quantization": "int4"},
    "int4-zeros": {"quantization": "int4", "group_size": 32, "symmetric": False},
    "int8": {"quantization": "int8"},
}
QUANTIZED_X = {
    "fp8": {"quantization": "fp8"},
    "smoothquant": {"quantization": "smoothquant"},
    "smoothquant-token": {"quantization": "smoothquant", "per_token": True, "per_channel": True},
}
"""The packaged model's weights, and x: checkpoints of these options are `packaged-NAME`, in the folder."""
PROMPT_LENGTHS = (1, 40, 77, 7, 7)
LOGITS_OF = 2
NEW_TOKENS, BEAM_TOKENS, NUM_BEAMS, CANDIDATES = 64, 16, 3, 5


def save_model(architecture: str, folder: Path) -> Path:
    """A random checkpoint with heads of a size that the attention plug-in has."""
    from tests.qwen_model import model_files

    if architecture == "QWenLMHeadModel":
        model, config = model_files.qwen_v1(hidden_size=96, num_attention_heads=3, kv_channels=32, seq_length=24)
        return model_files.save_reference(model, config, folder)
    if architecture == "DeciCoderForCausalLM":
        model, config = model_files.decicoder(hidden_size=128, num_attention_heads=4)
        return model_files.save_reference(model, config, folder)
    head = {"head_dim": 32} if architecture == "Qwen3ForCausalLM" else {}
    model = model_files.hugging_face_model(architecture, hidden_size=128, num_attention_heads=4, **head)
    return model_files.save_hugging_face(model, folder)


def expected(session: qwen_model.Session) -> dict[str, np.ndarray]:
    """What `test_tensorrt_gpu` compares with."""
    from tests.qwen_model.model_files import random_prompt

    vocab_size = session.config.model.vocab_size
    prompts = [random_prompt(length, seed, vocab_size) for seed, length in enumerate(PROMPT_LENGTHS)]
    found: dict[str, Any] = {f"prompt_{i}": prompt for i, prompt in enumerate(prompts)}
    found["logits"] = session.logits(prompts[LOGITS_OF])
    beams = session.generate(prompts[1:3], max_new_tokens=BEAM_TOKENS, num_beams=NUM_BEAMS).outputs
    found |= {f"beams_{i}": output.output_ids for i, output in enumerate(beams)}
    # Last: it writes into pages that the session's prefix cache knows by what they held before.
    found["tokens"], found["scores"] = candidates(session.device, prompts)
    return {name: np.asarray(value) for name, value in found.items()}


def candidates(device: Any, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy decoding: the likeliest tokens of each step, [steps, prompts, CANDIDATES], and their log-probabilities.

    The first is the one that goes on; the others tell a tie from an error.
    """
    most = -(-(LIMITS["max_input_len"] + LIMITS["max_output_len"]) // device.page_size)
    pages = np.arange(1, 1 + most * len(prompts)).reshape(len(prompts), most).tolist()
    sequences = [Running(prompt, slot, pages[slot]) for slot, prompt in enumerate(prompts)]
    device.start([sequence.start() for sequence in sequences])
    steps = []
    rows = [sequence.chunk(LIMITS["max_input_len"]) for sequence in sequences]
    for _ in range(NEW_TOKENS):
        device.forward(batch_of(rows))
        steps.append(device.choose(num_best=CANDIDATES).wait())
        rows = [sequence.decode() for sequence in sequences]
    return np.stack([step.best_tokens for step in steps]), np.stack([step.best_logprobs for step in steps])


def save_exact_results(model_dir: Path | None, path: Path, dtypes: list[str]) -> None:
    """Write what `compare` compares engines with, for test_tensorrt_gpu.py of the comparison."""
    from qwen_model.checkpoints.config import ModelConfig
    from qwen_model.evaluation.comparison.make_reference import make_reference
    from qwen_model.evaluation.comparison.reference_file import write_reference
    from qwen_model.packaged_model import packaged_model_dir
    from tests.qwen_model.model_files import random_prompt

    source = model_dir or packaged_model_dir()
    prompt = random_prompt(40, vocab_size=ModelConfig.from_model_dir(source).vocab_size)
    write_reference(path, make_reference(source, prompt, 4, dtypes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for architecture in [*ARCHITECTURES, "packaged"]:
        model_dir = None if architecture == "packaged" else options.folder / architecture
        if model_dir is not None and not model_dir.exists():
            save_model(architecture, model_dir)
        save_exact_results(model_dir, options.folder / f"{architecture}.safetensors", options.dtypes)
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory() as name:
                engine = Path(name) / "engine"
                qwen_model.build_engine(model_dir, output_dir=engine, dtype=dtype, **LIMITS)
                session = qwen_model.load_engine(engine, device=options.device)
            export_onnx(model_dir, output=options.folder / f"{architecture}-{dtype}.onnx", dtype=dtype, **LIMITS)
            np.savez_compressed(options.folder / f"{architecture}-{dtype}.npz", **expected(session))
            print(architecture, dtype, flush=True)
    if "float16" in options.dtypes:
        save_quantized_results(options.folder, options.device)


def save_quantized_results(folder: Path, device: str | None) -> None:
    for name, quantization in {**QUANTIZED, **QUANTIZED_X}.items():
        checkpoint = folder / f"packaged-{name}"
        if not checkpoint.exists():
            qwen_model.quantize_checkpoint(output_dir=checkpoint, **quantization)
        with tempfile.TemporaryDirectory() as temporary:
            engine = Path(temporary) / "engine"
            qwen_model.build_engine(checkpoint, output_dir=engine, dtype="float16", head_quantization="int8", **LIMITS)
            np.savez_compressed(
                folder / f"packaged-{name}-float16.npz", **expected(qwen_model.load_engine(engine, device=device))
            )
        print(f"packaged, {name}", flush=True)


if __name__ == "__main__":
    main()
