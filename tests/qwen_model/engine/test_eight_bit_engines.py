"""Engines with quantized x and weights on the CPU: logits and tokens of a plain writing of the same network."""

import pytest
import torch

import qwen_model
from qwen_model import QwenModelError
from qwen_model.evaluation.comparison.compare import check_engine
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.quantization.summary import weight_summary
from tests.qwen_model.eight_bit_files import FP8_METHODS, compressed_tensors_files, fp8_files
from tests.qwen_model.eight_bit_networks import (
    SCHEMES,
    distance,
    published_network,
    quantize_layers,
    set_exact,
    write_engine,
)
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

NEW_TOKENS = 24
MODELS = {
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 1}),
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
}
IN_BLOCKS = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 64,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}
PROMPT = random_prompt(60, seed=3)


PAIRS = [(model, scheme) for model in ("qwen2", "qwen3") for scheme in SCHEMES]


@pytest.fixture(scope="module", params=[*PAIRS, ("llama, biases", "int8 static")], ids=str)
def pair(request, tmp_path_factory):
    """A model of transformers with quantized layers, its logits before x was quantized, and our session."""
    name, scheme = request.param
    architecture, changes = MODELS[name]
    scheme = SCHEMES[scheme]
    folder = tmp_path_factory.mktemp("engine")
    reference = hugging_face_model(architecture, **{**changes, **(IN_BLOCKS if scheme.blocks else {})})
    save_hugging_face(reference, folder / "model")
    quantize_layers(reference, scheme, PROMPT)
    engine = write_engine(
        reference, scheme, folder / "model", folder / "engine", dtype="float32", max_input_len=60, max_output_len=40
    )
    return reference, scheme, qwen_model.load_engine(engine, device="cpu")


def logits_of(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0]


def test_logits(pair):
    """Until a rounding error moves a number of x to the next code, which later tokens and layers multiply."""
    reference, scheme, session = pair
    assert set(session.config.weight_formats.values()) == {scheme.format}
    expected = logits_of(reference, PROMPT)
    set_exact(reference, True)
    not_quantized = logits_of(reference, PROMPT)
    set_exact(reference, False)
    found = torch.from_numpy(session.logits(PROMPT))
    errors = (found - expected).abs().amax(1) / expected.abs().max()
    assert errors.min() < 1e-5
    assert distance(found, expected) < 0.8 * distance(not_quantized, expected)


@pytest.mark.parametrize(
    "files", [*[("W8A8", False), ("W8A8", True), ("FP8", False), ("FP8_DYNAMIC", False)], *FP8_METHODS]
)
def test_published_checkpoints(files, tmp_path):
    """An engine of each is built as it is, and computes what its tensors say."""
    if isinstance(files, str):
        folder, _ = fp8_files(tmp_path / "model", files)
    else:
        pytest.importorskip("compressed_tensors")
        folder = compressed_tensors_files(tmp_path / "model", *files)
    reference = published_network("Qwen2ForCausalLM", folder)
    limits = {"max_batch_size": 2, "max_input_len": 60, "max_output_len": 4}
    qwen_model.build_engine(folder, output_dir=tmp_path / "engine", dtype="float32", **limits)
    session = qwen_model.load_engine(tmp_path / "engine", device="cpu")
    expected = logits_of(reference, PROMPT)
    set_exact(reference, True)
    not_quantized = logits_of(reference, PROMPT)
    found = torch.from_numpy(session.logits(PROMPT))
    errors = (found - expected).abs().amax(1) / expected.abs().max()
    assert errors.min() < 1e-4
    assert distance(found, expected) < 0.8 * distance(not_quantized, expected)


def test_greedy_tokens(pair):
    reference, _, session = pair
    prompts = [PROMPT[:1], PROMPT[:33], PROMPT[10:]]
    outputs = session.generate(prompts, max_new_tokens=NEW_TOKENS).outputs
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = logits_of(reference, [*prompt, *output.output_ids])[len(prompt) - 1 : -1]
        best = logits.max(-1).values - logits[range(NEW_TOKENS), output.output_ids]
        assert float(best.max()) < 0.03 * float(logits.abs().max())  # nearly tied, where another was chosen
        assert (best == 0).float().mean() > 0.8


def test_chunks_and_company_change_nothing(pair):
    """What the cache has of a prompt is used again; in float32 the tokens are those of the whole prompt."""
    _, _, session = pair
    first = session.generate(PROMPT, max_new_tokens=NEW_TOKENS).outputs[0].output_ids
    again = session.generate([PROMPT, PROMPT[:40], PROMPT], max_new_tokens=NEW_TOKENS).outputs
    assert again[0].output_ids == again[2].output_ids == first


def test_what_is_shown_of_an_engine(pair, tmp_path):
    _, scheme, session = pair
    session.config.write(tmp_path)
    assert EngineConfig.read(tmp_path) == session.config
    layers = len(session.config.weight_formats)
    summary = weight_summary(session.config.model, "float32", session.config.weight_formats, {})
    assert summary.formats == {scheme.format.text: layers, "float32": 1}
    assert 8 < summary.bits < 8.8


def test_engines_with_quantized_x_are_not_compared(pair):
    _, scheme, session = pair
    with pytest.raises(QwenModelError, match=f"quantize what they read .{scheme.format.text}., beside whose error"):
        check_engine(session.config, session.config.model, 5, 1)
