"""Train the small model that is shipped in the package, on Python's standard library alone.

    python -m tools.train_packaged_model --output-dir OUTPUT [--stdlib-dir DIR] [--steps N] [--minutes N]

collects the corpus, trains the tokenizer and then the model, and writes a Hugging Face checkpoint with a
record of the training (``training.json``). It takes a few minutes on one data-centre GPU.
``--smoke`` does the same with toy sizes on a CPU. See ``docs/packaged_model.md``.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as functional
import transformers

from qwen_model.checkpoints.qwen_tiktoken import CHAT_END, CHAT_START, END_OF_TEXT
from tools.packaged_tokenizer import save_tokenizer, train_tokenizer
from tools.python_corpus import Corpus, collect_corpus, training_documents

EVALUATION_WINDOW = 1024
SAMPLE_PROMPTS = (
    "def read_json(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
    f"{CHAT_START}user\nWrite the Python function `maximum`: Return the largest item.{CHAT_END}\n"
    f"{CHAT_START}assistant\n",
)


@dataclass(frozen=True)
class Sizes:
    """Sizes are the shape of the model and of one training step."""

    vocab_size: int = 5120
    hidden_size: int = 256
    intermediate_size: int = 896
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    context: int = 2048
    batch: int = 32
    max_files: int | None = None


SMOKE_SIZES = Sizes(512, 64, 128, 2, 4, 2, context=128, batch=4, max_files=60)


@dataclass(frozen=True)
class Recipe:
    """A Recipe decides how the weights are trained."""

    steps: int
    minutes: float
    learning_rate: float
    weight_decay: float
    dropout: float
    seed: int
    warmup_steps: int = 200
    final_learning_rate_fraction: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_norm: float = 1.0


@dataclass(frozen=True)
class Perplexity:
    """A Perplexity is that of one stream, in windows of ``EVALUATION_WINDOW`` tokens that do not see one another."""

    perplexity_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int


def model_config(sizes: Sizes, tokenizer: tokenizers.Tokenizer) -> dict:
    """Return ``config.json`` in the plain form that every version of transformers reads."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(CHAT_END),
        "torch_dtype": "float16",
    }


def make_model(config: dict, recipe: Recipe, device: torch.device) -> transformers.Qwen2ForCausalLM:
    """Make a model with fresh float32 weights, and dropout after the embedding and each block's two halves."""
    torch.manual_seed(recipe.seed)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**config, "torch_dtype": "float32"}))

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, recipe.dropout, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)
    return model.to(device)


def make_optimizer(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """Make an AdamW that decays the matrices, not the norms and biases."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=device.type == "cuda")


def learning_rate(step: int, progress: float, recipe: Recipe) -> float:
    """Return linear warm-up, then a cosine down to a small fraction; ``progress`` goes from 0 to 1."""
    warmup = min(1.0, (step + 1) / min(recipe.warmup_steps, recipe.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    floor = recipe.final_learning_rate_fraction
    return recipe.learning_rate * warmup * (floor + (1 - floor) * cosine)


def training_batches(stream: torch.Tensor, sizes: Sizes, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield windows at random places of the token stream: inputs and their next tokens, [batch, context] each."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(sizes.context + 1, device=stream.device)
    while True:
        starts = torch.randint(len(stream) - sizes.context, (sizes.batch, 1), generator=generator)
        windows = stream[starts.to(stream.device) + offsets].long()
        yield windows[:, :-1], windows[:, 1:]


def next_token_loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of -log p over the targets, in float32."""
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: torch.Tensor, num_bytes: int) -> Perplexity:
    """Measure the perplexity of ``stream``, the tokens of ``num_bytes`` bytes of text."""
    was_training = model.training
    model.eval()
    nats = 0.0
    for start in range(0, len(stream) - 1, EVALUATION_WINDOW):
        window = stream[None, start : start + EVALUATION_WINDOW + 1].long()
        nats += next_token_loss(model, window[:, :-1], window[:, 1:]).item()
    model.train(was_training)
    predicted = len(stream) - 1
    return Perplexity(math.exp(nats / predicted), nats / math.log(2) / num_bytes, predicted, num_bytes)


def train(
    model: torch.nn.Module, stream: torch.Tensor, validation: tuple[torch.Tensor, int], sizes: Sizes, recipe: Recipe
) -> list[dict]:
    """Train in place, in bfloat16 over float32 weights; return the loss curve."""
    device = stream.device
    optimizer = make_optimizer(model, recipe, device)
    batches = training_batches(stream, sizes, recipe.seed)
    report_every, curve, started = max(1, recipe.steps // 80), [], time.monotonic()
    model.train()
    for step in range(recipe.steps):
        minutes = (time.monotonic() - started) / 60
        progress = max(step / recipe.steps, minutes / recipe.minutes)
        if progress >= 1:
            break
        rate = learning_rate(step, progress, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = next(batches)
        with torch.autocast(device.type, torch.bfloat16):
            loss = next_token_loss(model, inputs, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % report_every == 0 or step + 1 == recipe.steps:
            curve.append({"step": step + 1, "train_loss": round(loss.item(), 4), "learning_rate": rate})
            if len(curve) % 10 == 0 or step + 1 == recipe.steps:
                with torch.autocast(device.type, torch.bfloat16):
                    curve[-1]["validation_perplexity"] = round(evaluate(model, *validation).perplexity_per_token, 4)
            _report(curve[-1], recipe, (step + 1) * inputs.numel() / (time.monotonic() - started), started)
    return curve


def _report(entry: dict, recipe: Recipe, tokens_per_second: float, started: float) -> None:
    validation = entry.get("validation_perplexity")
    print(
        f"step {entry['step']:>6}/{recipe.steps}  loss {entry['train_loss']:.4f}  lr {entry['learning_rate']:.2e}"
        f"  {tokens_per_second / 1e3:.0f}k tokens/s  {time.monotonic() - started:.0f} s"
        + (f"  validation perplexity {validation:.3f}" if validation else ""),
        flush=True,
    )


def token_stream(tokenizer: tokenizers.Tokenizer, documents: list[str], device: torch.device) -> torch.Tensor:
    """Return the documents' tokens, [number of tokens] int32, with ``<|endoftext|>`` around each document."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    pieces = [np.array([end, *encoding.ids], np.int32) for encoding in encoded]
    return torch.from_numpy(np.concatenate([*pieces, np.array([end], np.int32)])).to(device)


def write_checkpoint(folder: Path, model: torch.nn.Module, config: dict, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a Hugging Face checkpoint, the weights in float16."""
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    half = {name: weight.to(torch.float16).contiguous().cpu() for name, weight in weights.items()}
    safetensors.torch.save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "bos_token_id": config["bos_token_id"],
        "pad_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
        "do_sample": False,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder, config["max_position_embeddings"])


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def sample(model: transformers.Qwen2ForCausalLM, tokenizer: tokenizers.Tokenizer, prompt: str) -> str:
    """Generate 120 greedy tokens after ``prompt``, or fewer if the model ends."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=120)
    return tokenizer.decode(output[0, ids.shape[1] :].tolist())


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Print the phase and record how many seconds it took."""
    print(f"{phase} ...", flush=True)
    started = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - started, 1)
    print(f"{phase}: {seconds[phase]:.1f} s", flush=True)


def corpus_record(corpus: Corpus, python_version: str) -> dict:
    """Return what the model was trained and judged on."""
    sets = {"train": corpus.train, "validation": corpus.validation, "held_out": corpus.held_out}
    return {
        "source": f"the standard library of CPython {python_version}",
        "license": "Python Software Foundation License Version 2 (LICENSE.python.txt)",
        "digest": corpus.digest(),
        "files": {name: len(files) for name, files in sets.items()},
        "bytes": {name: sum(source.num_bytes for source in files) for name, files in sets.items()},
    }


def machine_record(device: torch.device) -> dict:
    """Return the machine and the versions that it ran on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "safetensors": safetensors.__version__,
    }


def make_packaged_model(
    stdlib: tuple[Path, str], folder: Path, sizes: Sizes, recipe: Recipe, device: torch.device
) -> None:
    """Collect, train, measure and write into the empty ``folder``; ``stdlib`` is the sources' folder and version."""
    seconds: dict[str, float] = {}
    with timed(seconds, "collecting the corpus"):
        corpus = collect_corpus(stdlib[0], sizes.max_files)
        documents = training_documents(corpus.train, recipe.seed)
    with timed(seconds, "training the tokenizer"):
        tokenizer = train_tokenizer((source.text for source in corpus.train), sizes.vocab_size)
    with timed(seconds, "tokenising"):
        stream = token_stream(tokenizer, documents, device)
        evaluation = {
            name: (token_stream(tokenizer, [file.text for file in files], device), sum(f.num_bytes for f in files))
            for name, files in (("validation", corpus.validation), ("held_out", corpus.held_out))
        }
    config = model_config(sizes, tokenizer)
    model = make_model(config, recipe, device)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{num_parameters:,} parameters, {len(stream):,} tokens to train on")
    with timed(seconds, "training the model"):
        curve = train(model, stream, evaluation["validation"], sizes, recipe)
    write_checkpoint(folder, model, config, tokenizer)
    with timed(seconds, "evaluating what was written"):
        written = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        perplexity = {name: asdict(evaluate(written, *text)) for name, text in evaluation.items()}
        samples = [{"prompt": prompt, "continuation": sample(written, tokenizer, prompt)} for prompt in SAMPLE_PROMPTS]
    for name, values in perplexity.items():
        print(f"{name}: {values}")
    for example in samples:
        print(f"--- {example['prompt']}>>>{example['continuation']}")
    record = {
        "parameters": num_parameters,
        "training_tokens": len(stream),
        "perplexity_of": "the float16 weights, computed in float32",
        "perplexity": perplexity,
        "sizes": asdict(sizes),
        "recipe": asdict(recipe),
        "corpus": corpus_record(corpus, stdlib[1]),
        "machine": machine_record(device),
        "seconds": seconds,
        "loss_curve": curve,
        "samples": samples,
    }
    _write_json(folder / "training.json", record)
    (folder / "corpus.sha256").write_text(corpus.checksums(), encoding="utf-8")
    held_out = END_OF_TEXT.join(["", *(file.text for file in corpus.held_out), ""])
    (folder / "held_out.txt").write_text(held_out, encoding="utf-8")
    (folder / "LICENSE.python.txt").write_text(corpus.license_text, encoding="utf-8")
    for path in folder.iterdir():  # safetensors writes for its owner alone
        path.chmod(0o644)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="a new folder")
    parser.add_argument(
        "--stdlib-dir",
        type=Path,
        default=Path(sysconfig.get_paths()["stdlib"]),
        help="the standard library to train on (default: this Python's own)",
    )
    parser.add_argument(
        "--stdlib-version",
        default=platform.python_version(),
        help="the version that --stdlib-dir is of, for the record (default: this Python's)",
    )
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=3.0, help="at most, for the training (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest one (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: only to see that everything runs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Make the model in a folder beside the one asked for, which appears whole or not at all."""
    options = parse_arguments(arguments)
    output_dir: Path = options.output_dir
    if output_dir.exists():
        raise SystemExit(f"{output_dir} already exists: give a new folder")
    recipe = Recipe(
        steps=options.steps,
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        dropout=options.dropout,
        seed=options.seed,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    partial = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        sizes = SMOKE_SIZES if options.smoke else Sizes()
        make_packaged_model((options.stdlib_dir, options.stdlib_version), partial, sizes, recipe, device)
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    main()
