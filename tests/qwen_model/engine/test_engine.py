"""Engines as folders: what is in them, that they are whole or not there, and what is said of those that are wrong."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_model
from qwen_model import QwenModelError
from qwen_model.backends.torch import back_end
from qwen_model.backends.torch import device as torch_device
from qwen_model.interface.engine_config import EngineConfig, Limits
from tests.qwen_model.model_files import hugging_face_model, random_prompt, save_hugging_face

WEIGHT_FORMAT = {
    "kind": "float32",
    "group_size": 0,
    "symmetric": True,
    "activation": None,
    "layout": 1,
    "permuted": False,
    "scale_dtype": "",
    "activation_scale": "",
}


def build(model_dir, output_dir, **options):
    return qwen_model.build_engine(model_dir, output_dir=output_dir, **{"dtype": "float32", **options})


def test_the_folder(model_dir, tmp_path):
    steps = []
    summary = build(
        model_dir, tmp_path / "deep" / "engine", progress=lambda phase, done, total: steps.append((done, total))
    )
    assert {path.name for path in summary.engine_dir.iterdir()} == {
        "config.json",
        "weights",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    weights = {}
    for path in (summary.engine_dir / "weights").iterdir():
        weights.update(load_file(path))
    assert sum(weight.nbytes for weight in weights.values()) == summary.weight_bytes == steps[-1][0] == steps[-1][1]
    assert sum(weight.numel() for weight in weights.values()) == summary.config.num_parameters
    values = json.loads((summary.engine_dir / "config.json").read_text())
    assert values["format_version"] == 2
    assert values["backend"] == "torch"
    assert values["weight_format"] == WEIGHT_FORMAT
    assert values["disabled_plugins"] == []
    assert values["end_token_ids"] == [290, 301]
    assert values["versions"]["torch"] == torch.__version__
    assert EngineConfig.read(summary.engine_dir) == summary.config
    assert [path.name for path in summary.engine_dir.parent.iterdir()] == ["engine"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(model_dir, tmp_path, dtype):
    build(model_dir, tmp_path / "engine", dtype=dtype)
    build(model_dir, tmp_path / "exact")
    prompt = random_prompt(20)
    logits = qwen_model.load_engine(tmp_path / "engine", device="cpu").logits(prompt)
    exact = qwen_model.load_engine(tmp_path / "exact", device="cpu").logits(prompt)
    assert abs(logits - exact).max() / abs(exact).max() < {"float16": 0.01, "bfloat16": 0.08}[dtype]


def test_disabled_plugins_give_the_same(model_dir, tmp_path):
    prompt = random_prompt(20)
    choices = {"none": {}, "list": {"disable_plugins": ["rms_norm", "gemm"]}, "flag": {"rmsnorm_plugin": False}}
    outputs = []
    for name, options in choices.items():
        build(model_dir, tmp_path / name, **options)
        outputs.append(qwen_model.load_engine(tmp_path / name, device="cpu").generate(prompt).outputs)
    assert outputs[0] == outputs[1] == outputs[2]
    disabled = [EngineConfig.read(tmp_path / name).disabled_plugins for name in choices]
    assert disabled == [(), ("rms_norm", "gemm"), ("rms_norm",)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disable_plugins": ["norm"]}, "a plug-in to disable must be one of rms_norm, gemm, rotary, not 'norm'"),
        ({"disable_plugins": "gemm"}, "disable_plugins must be a collection of names, not the text 'gemm'"),
        ({"disable_plugins": ["rms_norm"], "rmsnorm_plugin": True}, "contradicts --disable-plugin rms_norm"),
        ({"rmsnorm_plugin": "yes"}, "rmsnorm_plugin must be True, False or None, not 'yes'"),
    ],
)
def test_plugins_that_cannot_be_disabled(model_dir, tmp_path, options, message):
    with pytest.raises(QwenModelError, match=message):
        build(model_dir, tmp_path / "engine", **options)
    assert not any(tmp_path.iterdir())


def test_tokenizers_are_loaded_before_the_work(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|gone|>"}')
    with pytest.raises(QwenModelError, match=r"names '<\|gone\|>'"):
        build(folder, tmp_path / "engine")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").touch()
    assert re.search("takes? token ids only.*AutoTokenizer", build(folder, tmp_path / "engine").warnings[0])


def test_tensors_that_share_memory(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.post_attention_layernorm.weight"] = state["model.layers.0.input_layernorm.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    build(folder, tmp_path / "engine")
    assert qwen_model.load_engine(tmp_path / "engine", device="cpu").logits([1, 2]).shape[0] == 2


@pytest.mark.parametrize("device", ["meta", "cpu:1", "mps"])
def test_devices_that_are_none(engine_dir, device):
    with pytest.raises(QwenModelError, match="device must be 'cpu' or 'cuda'"):
        qwen_model.load_engine(engine_dir, device=device)


def test_limits_follow_the_model(tmp_path):
    folder = save_hugging_face(hugging_face_model("LlamaForCausalLM", max_position_embeddings=100), tmp_path / "model")

    def limits(**options):
        summary = build(folder, tmp_path / "engine", **options)
        assert "the engine will take token ids only" in summary.warnings[0]
        return summary.config.limits, summary.warnings[1:]

    assert limits() == (Limits(256, 66, 34), ())
    assert limits(max_input_len=80) == (Limits(256, 80, 20), ())
    assert limits(max_output_len=10) == (Limits(256, 90, 10), ())
    for asked, text in (
        (
            {"max_input_len": 100},
            "prompts of 100 tokens leave none of the model's 100 for max_output_len.*--max-input-len",
        ),
        ({"max_output_len": 300}, "300 tokens of output leave none of the model's 100 for max_input_len"),
    ):
        with pytest.raises(QwenModelError, match=text):
            limits(**asked)
    _, warnings = limits(max_input_len=80, max_output_len=30)
    assert "110 tokens are longer than the 100" in warnings[0]
    scaled, warnings = limits(max_input_len=150, max_output_len=50, rotary_scaling={"rope_type": "linear", "factor": 2})
    assert (scaled.max_positions, warnings) == (200, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx"}, "backend must be one of torch, tensorrt, tensorrt-rtx, not 'onnx'"),
        ({"dtype": "int3"}, "dtype must be one of float16, bfloat16, float32, not 'int3'"),
        ({"max_batch_size": 0}, "max_batch_size must be a positive integer, not 0"),
        ({"rotary_scaling": {"rope_type": "magic"}}, "'magic' is not supported"),
    ],
)
def test_wrong_options(model_dir, tmp_path, options, message):
    with pytest.raises(QwenModelError, match=message):
        build(model_dir, tmp_path / "engine", **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_model_folders(model_dir, tmp_path):
    with pytest.raises(QwenModelError, match="nowhere is not a folder"):
        build(tmp_path / "nowhere", tmp_path / "engine")
    with pytest.raises(QwenModelError, match=r"not a Hugging Face checkpoint: it has no config.json"):
        build(tmp_path, tmp_path / "engine")
    shutil.copy(model_dir / "config.json", tmp_path)
    with pytest.raises(QwenModelError, match=r"neither model.safetensors nor"):
        build(tmp_path, tmp_path / "engine")


def test_engines_that_cannot_be_loaded(engine_dir, model_dir, tmp_path):
    def load(without=None, **changes):
        shutil.copytree(engine_dir, tmp_path / "engine", dirs_exist_ok=True)
        path = tmp_path / "engine" / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        values.pop(without, None)
        path.write_text(json.dumps(values))
        return qwen_model.load_engine(tmp_path / "engine", device="cpu")

    options = "--dtype float32 --max-batch-size 6 --max-input-len 120 --max-output-len 40 --max-num-tokens 720"
    with pytest.raises(QwenModelError, match=rf"is an engine of format 7.*build it again.*{options} --output-dir"):
        load(format_version=7)
    for rmsnorm_plugin, more in ((True, ""), (False, " --disable-plugin rms_norm")):
        said = rf"of format 1,.*format 2: build it again.*{options}{more} --output-dir"
        with pytest.raises(QwenModelError, match=said):
            load(format_version=1, rmsnorm_plugin=rmsnorm_plugin, without="disabled_plugins")
    with pytest.raises(QwenModelError, match="built for the back end 'tensorrt_llm'"):
        load(backend="tensorrt_llm")
    with pytest.raises(QwenModelError, match=r"damaged.*build the engine again"):
        load(limits={"sheep": 3})
    for change in ({"layout": 2}, {"kind": "int4", "group_size": 128}, {"more": 1}):
        ((name, value), *_) = change.items()
        said = rf"weights in the format {{.*'{name}': '?{value}.*reads {{.*'layout': 1.*build it again.*{options}"
        with pytest.raises(QwenModelError, match=said) as error:
            load(weight_format={**WEIGHT_FORMAT, **change})
        assert "\n" not in str(error.value)
    with pytest.raises(QwenModelError, match=r"weights in the format 'int4', this version of qwen_model reads"):
        load(weight_format="int4")
    with pytest.raises(QwenModelError, match=r"is not an engine; make one with qwen-model build"):
        qwen_model.load_engine(tmp_path / "nowhere")
    with pytest.raises(QwenModelError, match="is not an engine"):
        qwen_model.load_engine(model_dir)
    load(without="weight_format", weight_format=None)  # built before the format was recorded
    load(weight_format=WEIGHT_FORMAT)
    damaged = tmp_path / "damaged"
    shutil.copytree(engine_dir, damaged)
    (damaged / "config.json").write_text((damaged / "config.json").read_text()[:-20])
    with pytest.raises(QwenModelError, match=r"config\.json is damaged; build one in another folder"):
        qwen_model.load_engine(damaged)
    (tmp_path / "engine" / "weights" / "layer_001.safetensors").unlink()
    with pytest.raises(QwenModelError, match=r"is incomplete: layer_001\.safetensors is missing"):
        qwen_model.load_engine(tmp_path / "engine", device="cpu")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("dtype", "float17", "dtype must be one of float16, bfloat16, float32, not 'float17'"),
        ("disabled_plugins", ["softmax"], "plug-ins to disable must be of rms_norm, gemm, rotary, not 'softmax'"),
        ("disabled_plugins", None, "config.json is damaged"),
        ("model.num_layers", "6", "num_layers must be of type int, not '6'"),
        ("model.num_layers", 0, "num_layers must be of type int, not 0"),
        ("model.num_heads", True, "num_heads must be of type int, not True"),
        ("model.num_kv_heads", 4, "6 attention heads are not a multiple of the 4 key-value heads"),
        ("model.norm_eps", "tiny", "norm_eps must be of type float, not 'tiny'"),
        ("model.rotary.base", None, "base must be of type float, not None"),
        ("model.rotary", 3, "config.json is damaged"),
        ("model.architecture", "Mamba", "architecture must be one of"),
        ("limits.max_batch_size", "6", "max_batch_size must be a positive integer, not '6'"),
        ("end_token_ids", 3, "config.json is damaged"),
        ("end_token_ids", [[3]], "end_token_ids must be token ids, not ([3],)"),
        ("end_token_ids", [-1], "end_token_ids must be token ids, not (-1,)"),
        ("num_parameters", "many", "num_parameters must be a number and versions an object"),
    ],
)
def test_configurations_that_are_damaged(engine_dir, tmp_path, place, value, message):
    values = json.loads((engine_dir / "config.json").read_text())
    *path, last = place.split(".")
    inner = values
    for name in path:
        inner = inner[name]
    inner[last] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(QwenModelError, match=f"config.json is damaged.*{re.escape(message)}|{re.escape(message)}"):
        EngineConfig.read(tmp_path)


def test_weights_that_are_damaged(engine_dir, tmp_path):
    def load(change):
        shutil.copytree(engine_dir, tmp_path / "engine", dirs_exist_ok=True)
        change(tmp_path / "engine" / "weights" / "layer_001.safetensors")
        return qwen_model.load_engine(tmp_path / "engine", device="cpu")

    def changed(**tensors):
        def change(path):
            kept = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
            save_file(kept, path)

        return change

    with pytest.raises(QwenModelError, match=r"layer_001\.safetensors is damaged .*: build the engine again"):
        load(lambda path: path.write_bytes(path.read_bytes()[:1000]))
    name = "layers.1.mlp.down.weight"
    for wrong in (None, torch.zeros(3, 4), load_file(engine_dir / "weights/layer_001.safetensors")[name].half()):
        with pytest.raises(
            QwenModelError, match=rf"layer_001.*does not hold what config.json says \({re.escape(name)}:"
        ):
            load(changed(**{name: wrong}))
    with pytest.raises(QwenModelError, match=r"does not hold what config.json says \(layers.1.sheep:"):
        load(changed(**{"layers.1.sheep": torch.zeros(1)}))


@pytest.mark.parametrize(("name", "message"), [("abacus", "must be 'cpu' or 'cuda'"), ("cuda:99", "does not exist")])
def test_devices_that_are_not_there(engine_dir, name, message):
    with pytest.raises(QwenModelError, match=message):
        qwen_model.load_engine(engine_dir, device=name)


def test_what_a_gpu_needs_is_said_before_it_is_taken(engine_dir, monkeypatch):
    """Without a GPU: with one that has 1 KiB free, and one that has 1 GiB left of its tenth."""
    config = EngineConfig.read(engine_dir)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**10, 2**34))
    with pytest.raises(QwenModelError, match=r"not enough GPU memory: the weights need .* of 16\.00 GiB are free"):
        back_end.check_memory(config, torch.device("cuda"), 0.9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    with pytest.raises(QwenModelError, match=r"one sequence of 160 tokens needs .* a larger --gpu-memory-utilization"):
        back_end.check_memory(config, torch.device("cuda"), 0.9)


def test_what_a_cpu_needs_is_said_too(engine_dir, tmp_path):
    shutil.copytree(engine_dir, tmp_path / "engine")
    path = tmp_path / "engine" / "config.json"
    values = json.loads(path.read_text())
    values["limits"]["max_batch_size"] = 2**30
    path.write_text(json.dumps(values))
    with pytest.raises(QwenModelError, match=r"key-value cache has 0\.00 GiB.* one sequence .*--max-batch-size"):
        qwen_model.load_engine(tmp_path / "engine", device="cpu")


def test_a_gpu_whose_memory_runs_out_half_way(engine_dir, monkeypatch):
    def run_out(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB of which 1.50 "
            "GiB is free. Including non-PyTorch memory, this process has 138.21 GiB memory in use. Of the allocated"
        )

    session = qwen_model.load_engine(engine_dir, device="cpu")
    expected = r"^CUDA out of memory\. Tried to allocate 20\.00 GiB\. GPU 0 has .* 1\.50 GiB is free; give a smaller"
    monkeypatch.setattr(torch_device, "decoder", run_out)
    with pytest.raises(QwenModelError, match=expected):
        session.generate([1, 2, 3])
    with pytest.raises(QwenModelError, match=expected):
        session.logits([1, 2, 3])
    monkeypatch.undo()
    monkeypatch.setattr(torch_device, "rotary_table", run_out)
    with pytest.raises(QwenModelError, match=expected):
        qwen_model.load_engine(engine_dir, device="cpu")


def test_an_engine_survives_its_checkpoint(tmp_path):
    folder = save_hugging_face(hugging_face_model("Qwen3ForCausalLM"), tmp_path / "model")
    build(folder, tmp_path / "engine")
    prompt = random_prompt(9)
    before = qwen_model.load_engine(tmp_path / "engine", device="cpu").generate(prompt).outputs
    shutil.rmtree(folder)
    (tmp_path / "engine").rename(tmp_path / "elsewhere")
    assert qwen_model.load_engine(tmp_path / "elsewhere", device="cpu").generate(prompt).outputs == before
