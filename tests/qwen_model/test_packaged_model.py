"""The model that comes with the package: whole, loadable by others, as good as its record says, and licensed."""

import hashlib

import pytest

from qwen_model.packaged_model import held_out_text, packaged_model_dir, training_record

END_OF_TEXT = "<|endoftext|>"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from qwen_model import build_engine, load_engine

    engine_dir = tmp_path_factory.mktemp("packaged") / "engine"
    build_engine(output_dir=engine_dir, dtype="float32")
    return load_engine(engine_dir, device="cpu")


@pytest.fixture(scope="module")
def reference():
    """The checkpoint as transformers loads it; nothing may be missing or left over."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        packaged_model_dir(), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_is_small():
    files = [path for path in packaged_model_dir().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6


def test_weights_are_finite_float16():
    safetensors_torch = pytest.importorskip("safetensors.torch")
    weights = safetensors_torch.load_file(packaged_model_dir() / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == training_record()["parameters"]
    for name, weight in weights.items():
        assert str(weight.dtype) == "torch.float16", name
        assert weight.isfinite().all(), name


def test_shape_is_a_small_qwen2(reference):
    config = reference.config
    assert type(reference).__name__ == "Qwen2ForCausalLM"
    assert 4 <= config.num_hidden_layers <= 8
    assert 1 < config.num_key_value_heads < config.num_attention_heads
    assert reference.model.layers[0].self_attn.q_proj.bias is not None
    assert reference.lm_head.weight is reference.model.embed_tokens.weight


def test_perplexity_is_the_recorded_one(session):
    from qwen_model.perplexity import measure_perplexity

    recorded = training_record()["perplexity"]["held_out"]
    result = measure_perplexity(session)
    assert (result.tokens, result.bytes, result.window) == (recorded["tokens"], recorded["bytes"], 1024)
    assert result.per_token == pytest.approx(recorded["perplexity_per_token"], rel=1e-4)
    assert result.bits_per_byte == pytest.approx(recorded["bits_per_byte"], rel=1e-4)


def test_predicts_far_better_than_a_general_compressor():
    """Bits per byte of held-out text; xz, which may see all of it, needs more than twice as many."""
    import lzma

    text = held_out_text().encode()
    xz_bits_per_byte = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert training_record()["perplexity"]["held_out"]["bits_per_byte"] < 0.5 * xz_bits_per_byte


def test_perplexity_agrees_with_transformers(session, reference):
    import torch

    from qwen_model.perplexity import next_token_nats

    ids = session.tokenizer.encode(held_out_text())[:3000]
    with torch.no_grad():
        windows = [torch.tensor([ids[start : start + 1025]]) for start in range(0, len(ids) - 1, 1024)]
        losses = [float(reference(window, labels=window).loss) * (window.shape[1] - 1) for window in windows]
    assert next_token_nats(session.logits, ids) == pytest.approx(sum(losses), rel=1e-5)


def test_greedy_tokens_agree_with_transformers(session, reference):
    import torch

    ids = session.tokenizer.encode("def read_json(path):\n")
    ours = session.generate(ids, max_new_tokens=64).outputs[0].output_ids
    theirs = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
    assert ours == theirs.tolist()


def test_continues_code_that_it_never_saw(session):
    """What follows from Python's grammar and habits."""
    prompts = [
        "class Point:\n    def __init__(",
        "import os\nimport",
        "if __name__ ==",
        "try:\n    import ssl\nexcept",
    ]
    outputs = session.generate(prompts, max_new_tokens=6).outputs
    expected = ["self,", " sys\n", " '__main__':", " ImportError:"]
    for prompt, output, text in zip(prompts, outputs, expected, strict=True):
        assert output.text.replace('"', "'").startswith(text), (prompt, output.text)


def test_answers_a_chat_and_ends(session):
    question = "Write the Python function `is_empty`: Return True if the queue is empty."
    output = session.generate(question, chat=True, max_new_tokens=200).outputs[0]
    assert output.finish_reason == "stop"
    assert output.text.startswith("def is_empty(self")
    compile(output.text, "answer", "exec")


def test_tokenizer_agrees_with_transformers(session):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(packaged_model_dir())
    texts = [held_out_text()[:20_000], "你好，世界 👋🏽 naïve\r\n\t  x<|im_end|>y"]
    for text in texts:
        assert session.tokenizer.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "What is `sched`?"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert session.tokenizer.apply_chat_template(messages) == expected


def test_held_out_files_were_not_trained_on():
    sets = _checksums()
    assert hashlib.sha256(_checksums_text().encode()).hexdigest() == training_record()["corpus"]["digest"]
    documents = [document for document in held_out_text().split(END_OF_TEXT) if document]
    digests = {hashlib.sha256(document.encode()).hexdigest() for document in documents}
    assert digests == set(sets["held_out"])
    assert not digests & (set(sets["train"]) | set(sets["validation"]))
    assert {name: len(files) for name, files in sets.items()} == training_record()["corpus"]["files"]


def test_notice_is_shipped():
    notice = (packaged_model_dir() / "LICENSE.python.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice


def test_loss_curve_is_recorded():
    curve = training_record()["loss_curve"]
    assert len(curve) > 20
    assert curve[-1]["train_loss"] < 0.5 * curve[0]["train_loss"]


def _checksums_text():
    return (packaged_model_dir() / "corpus.sha256").read_text(encoding="utf-8")


def _checksums():
    sets = {}
    for line in _checksums_text().splitlines():
        if line.startswith("# "):
            files = sets.setdefault(line[2:], [])
        else:
            files.append(line.split("  ")[0])
    return sets
