"""Engines with quantized weights give the tokens of engines that have the same numbers in floating point."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import qwen_model
from qwen_model import QwenModelError
from qwen_model import build as build_command
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.module_weights import WeightFormat
from qwen_model.engine.plan import fitting_cards, plan_engine
from qwen_model.engine.quantize import quantize_checkpoint
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.interface.memory import step_bytes
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face
from tests.qwen_model.quantized_files import SIZES, Layout, save_layout

NEW_TOKENS = 64
LAYOUTS = {
    "gptq": Layout("gptq"),
    "gptq desc_act": Layout("gptq", desc_act=True),
    "gptq int8": Layout("gptq", bits=8, group_size=64, symmetric=False),
    "gptq dynamic": Layout("gptq", dynamic={"mlp.down_proj": (8, 64)}, ignored=("layers.1.mlp.down_proj",)),
    "awq": Layout("awq", symmetric=False, group_size=64),
    "w4a16": Layout("compressed-tensors", symmetric=False),
    "w8a16": Layout("compressed-tensors", bits=8, group_size=-1),
}


def build(model_dir, engine_dir, **options):
    options = {"dtype": "float32", "max_batch_size": 2, "max_input_len": 60, "max_output_len": NEW_TOKENS, **options}
    return qwen_model.build_engine(model_dir, output_dir=engine_dir, **options)


def tokens_and_logits(engine_dir):
    dataclasses.replace(EngineConfig.read(engine_dir), end_token_ids=()).write(engine_dir)
    session = qwen_model.load_engine(engine_dir, device="cpu")
    prompt = random_prompt(40, seed=3)
    output = session.generate(prompt, max_new_tokens=NEW_TOKENS).outputs[0].output_ids
    return output, session.logits(prompt)


@pytest.fixture(scope="module")
def plain_dir(tmp_path_factory):
    return save_hugging_face(hugging_face_model("Qwen2ForCausalLM", seed=7, **SIZES), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_published_checkpoints(tmp_path, layout):
    """As the checkpoint of the dequantized numbers, as `quantization="none"`, which makes that engine, says too."""
    quantized, dequantized, _ = save_layout(tmp_path, layout)
    summary = build(quantized, tmp_path / "engine")
    assert summary.weights.bits > 0
    assert summary.config.weight_formats
    build(dequantized, tmp_path / "plain")
    build(quantized, tmp_path / "none", quantization="none")
    expected, expected_logits = tokens_and_logits(tmp_path / "plain")
    for name in ("engine", "none"):
        found, logits = tokens_and_logits(tmp_path / name)
        assert found == expected
        np.testing.assert_allclose(logits, expected_logits, atol=2e-4, rtol=1e-4)
    assert summary.weight_bytes < 0.7 * build(quantized, tmp_path / "none", quantization="none").weight_bytes


OWN = {
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "group_size": 32},
    "int4 zero points": {"quantization": "int4", "group_size": 64, "symmetric": False, "head_quantization": "int4"},
    "int4 one group": {"quantization": "int4", "group_size": -1, "head_quantization": "none"},
}


def dequantized_checkpoint(engine_dir, plain_dir, folder):
    """The checkpoint of the numbers that an engine's codes stand for, unpacked by the GEMM's own reference."""
    from safetensors.torch import load_file, save_file

    from qwen_plugins import quantized

    tensors = load_file(plain_dir / "model.safetensors")
    config = EngineConfig.read(engine_dir)
    names = {"attention.qkv": "qkv", "attention.output": "o", "mlp.gate_up": ("gate", "up"), "mlp.down": ("down",)}
    for path in sorted((engine_dir / "weights").iterdir()):
        packed = load_file(path)
        for module, found in config.weight_formats.items():
            if f"{module}.weight" not in packed:
                continue
            rows, columns = module_shape(module)
            weight = torch.from_numpy(
                quantized.dequantize(
                    quantized.PackedWeight(
                        packed[f"{module}.weight"].numpy(),
                        packed[f"{module}.scales"].numpy(),
                        packed[f"{module}.zeros"].numpy() if f"{module}.zeros" in packed else None,
                        quantized.WeightFormat(found.bits, found.group_size, not found.symmetric, found.scale_dtype),
                        rows,
                        columns,
                    )
                )
            )
            if module == "lm_head":
                tensors["lm_head.weight"] = weight
                continue
            _, layer, kind = module.split(".", 2)
            parent = kind.split(".")[0].replace("attention", "self_attn")
            parts = [f"model.layers.{layer}.{parent}.{name}_proj.weight" for name in names[kind]]
            for part, rows_of in zip(parts, weight.split([len(tensors[part]) for part in parts]), strict=True):
                tensors[part] = rows_of.contiguous()
    folder.mkdir()
    (folder / "config.json").write_bytes((plain_dir / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def module_shape(module):
    hidden, inner, head = SIZES["hidden_size"], SIZES["intermediate_size"], 16
    heads = SIZES["num_attention_heads"] + 2 * SIZES["num_key_value_heads"]
    kind = module.split(".", 2)[-1]
    return {
        "attention.qkv": (heads * head, hidden),
        "attention.output": (hidden, hidden),
        "mlp.gate_up": (2 * inner, hidden),
        "mlp.down": (hidden, inner),
        "lm_head": (SIZES["vocab_size"], hidden),
    }[kind]


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_quantized_here(tmp_path, plain_dir, options):
    summary = build(plain_dir, tmp_path / "engine", **options)
    assert EngineConfig.read(tmp_path / "engine") == summary.config
    modules = 8 if options.get("head_quantization") == "none" else 9
    assert len(summary.config.weight_formats) == len(summary.weights.relative_errors) == modules
    build(dequantized_checkpoint(tmp_path / "engine", plain_dir, tmp_path / "dequantized"), tmp_path / "plain")
    found, logits = tokens_and_logits(tmp_path / "engine")
    expected, expected_logits = tokens_and_logits(tmp_path / "plain")
    assert found == expected
    np.testing.assert_allclose(logits, expected_logits, atol=2e-4, rtol=1e-4)


def test_a_tied_head_is_quantized_and_the_embedding_is_not(tmp_path):
    model = hugging_face_model("Qwen2ForCausalLM", seed=7, **SIZES, tie_word_embeddings=True)
    folder = save_hugging_face(model, tmp_path / "model")
    with_head = build(folder, tmp_path / "with", quantization="int8")
    without = build(folder, tmp_path / "without", quantization="int8", head_quantization="none")
    head_alone = build(folder, tmp_path / "alone", head_quantization="int8")
    assert "lm_head" in with_head.config.weight_formats
    assert "lm_head" not in without.config.weight_formats
    assert list(head_alone.config.weight_formats) == ["lm_head"]
    head_bytes = 320 * (128 + 2)  # codes of inputs padded to 128, and a scale
    assert with_head.weight_bytes == without.weight_bytes + head_bytes
    plain = build(folder, tmp_path / "plain")
    assert head_alone.weight_bytes == plain.weight_bytes + head_bytes
    logits = [tokens_and_logits(tmp_path / name)[1] for name in ("alone", "plain")]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.05 * np.abs(logits[1]).max()


def test_published_checkpoints_keep_their_head(tmp_path):
    quantized, _, _ = save_layout(tmp_path, Layout("gptq"))
    assert "lm_head" not in build(quantized, tmp_path / "engine").config.weight_formats
    formats = build(quantized, tmp_path / "engine", head_quantization="int8").config.weight_formats
    assert formats["lm_head"] == WeightFormat("int8", layout=2, scale_dtype="float16")


@pytest.mark.parametrize("head", ["int4", "none"])
def test_a_quantized_head_stays_as_it_is(tmp_path, plain_dir, head):
    quantized = tmp_path / "quantized"
    quantize_checkpoint(plain_dir, output_dir=quantized, quantization="int8", head_quantization="int8")
    with pytest.raises(QwenModelError, match=r"the head is quantized already \(int8, .*\): leave out"):
        build(quantized, tmp_path / "engine", head_quantization=head)
    assert build(quantized, tmp_path / "none", quantization="none", head_quantization="none").weights.bits == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_engines_of_16_bits_keep_the_scales_of_the_checkpoint(tmp_path, dtype):
    for layout in (Layout("gptq"), Layout("compressed-tensors")):
        quantized, _, _ = save_layout(tmp_path / layout.method, layout)
        summary = build(quantized, tmp_path / "engine", dtype=dtype)
        formats = set(summary.config.weight_formats.values())
        assert {each.scale_dtype for each in formats} == {str(layout.dtype).removeprefix("torch.")}
        assert any("scales" in warning for warning in summary.warnings) == (f"torch.{dtype}" != str(layout.dtype))
        assert len(tokens_and_logits(tmp_path / "engine")[0]) == NEW_TOKENS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "quantization must be one of auto, none, int8, int4, smoothquant, fp8, not 'int3'"),
        ({"quantization": "int4", "group_size": 48}, r"group_size must be 32, 64, 128 or -1 \(all inputs\), not 48"),
        ({"quantization": "int4", "group_size": True}, "group_size must be 32, 64, 128 or -1"),
        ({"quantization": "int4"}, r"qkv has 64 inputs, which are no groups of 128.* of 32 or 64 or -1"),
        (
            {"quantization": "int8", "group_size": 32},
            r"^group_size \(--group-size\) is for quantization int4, not 'int8'",
        ),
        ({"symmetric": False}, r"^symmetric \(--asymmetric\) is for quantization int4, not"),
        ({"head_quantization": "fp8"}, "head_quantization must be one of int8, int4, none, not 'fp8'"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(tmp_path, plain_dir, options, message):
    with pytest.raises(QwenModelError, match=message):
        build(plain_dir, tmp_path / "engine", **options)
    assert not (tmp_path / "engine").exists()


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    quantized, _, _ = save_layout(tmp_path, Layout("gptq"))
    with pytest.raises(QwenModelError, match=r"is quantized already, with gptq \(config\.json\): leave out"):
        build(quantized, tmp_path / "engine", quantization="int8")


def test_groups_that_the_kernels_do_not_have(tmp_path):
    quantized, _, _ = save_layout(tmp_path, Layout("gptq", group_size=16))
    with pytest.raises(QwenModelError, match=r"layers\.0\.attention\.qkv is quantized in groups of 16 inputs"):
        build(quantized, tmp_path / "engine")
    assert build(quantized, tmp_path / "none", quantization="none").config.weight_formats == {}


def test_large_groups_become_several(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    quantized, dequantized, _ = save_layout(tmp_path, Layout("gptq", group_size=256), **sizes)
    summary = build(quantized, tmp_path / "engine")
    assert summary.config.weight_formats["layers.0.mlp.down"].group_size == 128
    build(dequantized, tmp_path / "plain")
    assert tokens_and_logits(tmp_path / "engine")[0] == tokens_and_logits(tmp_path / "plain")[0]


def test_formats_that_this_version_does_not_read(tmp_path, plain_dir):
    build(plain_dir, tmp_path / "engine", quantization="int8")
    path = tmp_path / "engine" / "config.json"
    values = json.loads(path.read_text())
    for change in ({"layout": 3}, {"kind": "int3"}, {"group_size": 48}, {"scale_dtype": "float8"}, {"new": 1}):
        formats = [{**values["weight_formats"][0], **change}, *values["weight_formats"][1:]]
        path.write_text(json.dumps({**values, "weight_formats": formats}))
        with pytest.raises(QwenModelError, match=r"in the format .* are not read by this version"):
            EngineConfig.read(tmp_path / "engine")
    for damaged in ({}, [1], [{"kind": "int8"}], [{"modules": [1]}]):
        path.write_text(json.dumps({**values, "weight_formats": damaged}))
        with pytest.raises(QwenModelError, match="weight_formats must"):
            EngineConfig.read(tmp_path / "engine")


def test_the_command_that_builds_such_an_engine(tmp_path, plain_dir):
    options = {"quantization": "int4", "group_size": 32, "symmetric": False, "head_quantization": "none"}
    build(plain_dir, tmp_path / "engine", **options)
    config = EngineConfig.read(tmp_path / "engine")
    command = "--quantization int4 --group-size 32 --asymmetric --head-quantization none"
    assert command in config.build_command(tmp_path / "engine")


def test_inspect_shows_the_formats(tmp_path, plain_dir):
    from qwen_model.evaluation.inspection import inspect_engine, text

    build(plain_dir, tmp_path / "engine", quantization="int4", group_size=32, kv_cache_dtype="fp8")
    shown = text(inspect_engine(str(tmp_path / "engine"), device="cpu")).splitlines()
    assert "weights   8 x int4, groups of 32; 1 x int8, a scale per output; others float32" in shown
    assert "cache     fp8" in shown


def test_activation_aware(tmp_path, model_dir):
    """With a scale per output and 8 bits almost nothing is left of the quantization, so the function is the same."""
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = {"quantization": "int8", "head_quantization": "none"}
    build(model_dir, tmp_path / "plain")
    build(model_dir, tmp_path / "aware", **options, activation_aware=True, calibration=tmp_path / "text")
    build(model_dir, tmp_path / "unaware", **options)
    plain, aware, unaware = (tokens_and_logits(tmp_path / name)[1] for name in ("plain", "aware", "unaware"))
    error = np.abs(aware - plain).mean()
    assert 0 < error < 2 * np.abs(unaware - plain).mean() < 0.05 * np.abs(plain).mean()
    from safetensors.torch import load_file

    norms = [
        load_file(tmp_path / name / "weights" / "layer_001.safetensors")["layers.1.input_norm.weight"]
        for name in ("plain", "aware")
    ]
    assert not torch.equal(*norms)  # the input scales are folded there


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_aware": True}, r"activation_aware \(--activation-aware\) is for quantization int8 or int4"),
        ({"quantization": "int8", "calibration": "text"}, r"calibration \(--calibration\) is for activation_aware"),
        ({"quantization": "int8", "activation_aware": True, "calibration": "nothing"}, "nothing cannot be read"),
    ],
)
def test_calibration_that_cannot_be(tmp_path, model_dir, options, message):
    with pytest.raises(QwenModelError, match=message):
        build(model_dir, tmp_path / "engine", **options)
    (tmp_path / "short").write_text("short")
    with pytest.raises(QwenModelError, match="needs at least 256 tokens"):
        build(
            model_dir, tmp_path / "engine", quantization="int8", activation_aware=True, calibration=tmp_path / "short"
        )


def test_plan(tmp_path, plain_dir):
    """As large as the engine that is then built."""
    sizes = {"max_batch_size": 3, "max_input_len": 60, "max_output_len": NEW_TOKENS}
    options = {"dtype": "float16", "quantization": "int4", "group_size": 32, **sizes}
    plan, summary = plan_engine(plain_dir, **options), build(plain_dir, tmp_path / "engine", **options)
    assert plan.weight_bytes == summary.weight_bytes
    assert plan.sequence_bytes == summary.sequence_bytes
    files = sum(path.stat().st_size for path in (tmp_path / "engine" / "weights").iterdir())
    assert plan.weight_bytes < files < plan.weight_bytes + 4 * 8192  # headers
    assert plan.token_bytes == 2 * 2 * 2 * 16 * 2  # layers, k and v, kv heads, head size, bytes
    assert (plan.sequences, plan.positions) == (3, 60 + NEW_TOKENS)
    counts = fitting_cards(plan, cards=(1, 2))
    assert 0 < counts[1] < counts[2]
    assert plan_engine(plain_dir, dtype="float16").weight_bytes > plan.weight_bytes
    with pytest.raises(QwenModelError, match="no groups of 128"):
        plan_engine(plain_dir, quantization="int4")
    with pytest.raises(QwenModelError, match="backend must be one of torch, tensorrt, tensorrt-rtx, not 'onnx'"):
        plan_engine(plain_dir, backend="onnx")


@pytest.mark.parametrize("max_batch_size", [None, 2])
def test_plan_has_the_largest_step_of_the_engine_that_build_makes(tmp_path, max_batch_size):
    options = {"dtype": "float16", "max_batch_size": max_batch_size}
    plan = plan_engine(**options)
    config = qwen_model.build_engine(output_dir=tmp_path / "engine", **options).config
    assert plan.activation_bytes == step_bytes(config.model, config.limits, "float16")
    assert plan.sequences == (max_batch_size or 1)


@pytest.mark.parametrize("arguments", [[], ["--dtype", "float16"], ["--backend", "tensorrt-rtx"]])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_plan_says_if_build_here_would_choose_another_type(tmp_path, capsys, monkeypatch, arguments, has_gpu):
    """The packaged checkpoint is float16, and torch engines are float32 where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    build_command.main(["--plan", *arguments])
    note = " on a GPU; on this machine build makes float32, unless --dtype is given"
    planned = capsys.readouterr().out.splitlines()[0]
    assert planned == f"type        float16{note if not arguments and not has_gpu else ''}"
    if "--backend" not in arguments:
        build_command.main([*arguments, "--output-dir", str(tmp_path / "engine")])
        built = "float32" if note in planned else "float16"
        assert EngineConfig.read(tmp_path / "engine").dtype == built


@pytest.mark.parametrize(
    "arguments",
    [
        ["--hardware-compatible"],
        ["--compute-capability", "8.6"],
        ["--backend", "tensorrt-rtx", "--compute-capability", "1.0"],
        ["--rmsnorm-plugin", "--disable-plugin", "rms_norm"],
        ["--backend", "tensorrt-rtx", "--disable-plugin", "gemm"],
        ["--timing-cache", "timings"],
    ],
)
def test_plan_refuses_what_build_refuses(tmp_path, arguments):
    errors = []
    for command in (["--plan"], ["--output-dir", str(tmp_path / "engine")]):
        with pytest.raises(QwenModelError) as caught:
            build_command.main([*command, *arguments])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_plan_of_sequences_that_a_rotary_scaling_makes_longer(tmp_path, plain_dir, capsys):
    positions = ModelConfig.from_model_dir(plain_dir).max_positions
    arguments = ["--plan", "--model-dir", str(plain_dir), "--max-input-len", str(2 * positions - 8)]
    build_command.main([*arguments, "--max-output-len", "8", "--rotary-scaling", "linear:2"])
    assert f"of {2 * positions} tokens" in capsys.readouterr().out


def test_a_layer_that_does_not_suit_its_format(tmp_path, plain_dir):
    """Some numbers of the layer are much larger than the others of their groups, whose codes are 0 then."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(plain_dir / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:, ::32] *= 12
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_bytes((plain_dir / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    for group_size, remedy in ((64, "--group-size 32 or int8"), (32, "int8")):
        options = {"quantization": "int4", "group_size": group_size}
        built = build(folder, tmp_path / f"engine{group_size}", **options)
        written = quantize_checkpoint(folder, output_dir=tmp_path / f"quantized{group_size}", **options)
        warnings = [each for each in built.warnings if "their weights" in each]
        assert warnings == [each for each in written.warnings if "their weights" in each]
        error = built.weights.relative_errors["layers.1.mlp.down"]
        assert warnings[0].startswith(f"layers.1.mlp.down ({error:.0%}) lose more than 16% of their weights in int4, ")
        assert f": {remedy} has" in warnings[0]
        assert len(warnings) == 1
    # Where it has no such numbers, and in 8 bits.
    for name, options in OWN.items():
        source = plain_dir if "int4" in name else folder
        assert "their weights" not in " ".join(build(source, tmp_path / name.replace(" ", "_"), **options).warnings)
