"""Reading checkpoints of every form, naming what is wrong with them, and how each weight splits."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwen_model import QwenModelError
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.checkpoints.config import ModelConfig
from qwen_model.checkpoints.tensor_files import all_finite
from qwen_model.checkpoints.weights import Section, Source, WeightSpec, weight_groups
from tests.qwen_model.model_files import hugging_face_model, qwen_v1, save_hugging_face, save_reference


def read_all(folder):
    config = ModelConfig.from_model_dir(folder)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    groups = weight_groups(config, checkpoint.dtype)
    return {spec.name: checkpoint.read(spec) for group in groups for spec in group.specs}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hugging_face(hugging_face_model("Qwen2ForCausalLM"), tmp_path_factory.mktemp("one") / "model")


@pytest.fixture
def broken(folder, tmp_path):
    """A function that writes the checkpoint with its tensors changed."""

    def write(change):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


def test_fused_weights(folder):
    weights = read_all(folder)
    model = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.self_attn"
    for kind in ("weight", "bias"):
        parts = [model[f"{prefix}.{name}_proj.{kind}"] for name in "qkv"]
        torch.testing.assert_close(weights[f"layers.1.attention.qkv.{kind}"], torch.cat(parts))
    assert weights["layers.2.mlp.gate_up.weight"].shape == (344, 84)


def test_shards_and_bin_files_hold_the_same(folder, tmp_path):
    expected = read_all(folder)
    model = hugging_face_model("Qwen2ForCausalLM")
    save_hugging_face(model, tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert_same(read_all(tmp_path / "shards"), expected)

    state = model.state_dict()
    config = (folder / "config.json").read_bytes()
    for name in ("bin", "old", "bins"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(config)
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    torch.save(state, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    weight_map = {name: f"part-{index % 2}.bin" for index, name in enumerate(state)}
    for part in set(weight_map.values()):
        torch.save({name: state[name] for name in state if weight_map[name] == part}, tmp_path / "bins" / part)
    (tmp_path / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name in ("bin", "old", "bins"):
        assert_same(read_all(tmp_path / name), expected)


def test_bin_files_run_no_code(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"x": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(QwenModelError, match=r"cannot be read: it holds print besides tensors") as error:
        Checkpoint(tmp_path)
    assert "weights_only" not in str(error.value)


def test_missing_extra_and_misshapen_tensors_are_named(broken):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(84)
        tensors["lm_head.weight"] = torch.zeros(317, 83)

    with pytest.raises(QwenModelError) as error:
        read_all(broken(change))
    assert "1 tensor missing: model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "not known to this architecture: model.layers.0.self_attn.o_proj.bias" in str(error.value)
    assert "of the wrong shape: lm_head.weight [317, 83], expected [317, 84]" in str(error.value)


def test_buffers_of_old_checkpoints_are_let_be(broken):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(7)

    read_all(broken(change))


def test_a_tied_head_may_be_there_or_not(tmp_path):
    model = hugging_face_model("Qwen2ForCausalLM", tie_word_embeddings=True)
    folder = save_hugging_face(model, tmp_path / "model")
    expected = read_all(folder)
    assert "lm_head.weight" not in expected
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert_same(read_all(folder), expected)


def test_a_tied_head_that_is_another_is_refused(tmp_path):
    folder = save_hugging_face(hugging_face_model("Qwen2ForCausalLM", tie_word_embeddings=True), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    for head in (table + 1, table[1:].clone(), table.int()):
        save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
        with pytest.raises(
            QwenModelError, match=r"tie_word_embeddings, but lm_head\.weight differs from model\.embed_tok"
        ):
            read_all(folder)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
def test_of_a_tied_pair_only_the_head_may_be_saved(architecture, tmp_path):
    folder = save_hugging_face(hugging_face_model(architecture, tie_word_embeddings=True), tmp_path / "model")
    expected = read_all(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(read_all(folder), expected)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(loaded.get_input_embeddings().weight.data, expected["embedding.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_numbers_that_are_not_finite_are_found_in_every_type(broken, dtype, value, framework):
    name = "model.layers.1.self_attn.v_proj.weight"

    def change(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[name][-1, -1] = value

    folder = broken(change)
    checkpoint = Checkpoint(folder, framework)
    checkpoint.check(ModelConfig.from_model_dir(folder))
    with pytest.raises(QwenModelError, match=rf"{name} has numbers that are not finite"):
        checkpoint.tensor(name)
    checkpoint.tensor("model.layers.1.self_attn.k_proj.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_and_the_smallest_numbers_are_finite(dtype):
    limits = torch.finfo(dtype)
    for tensor in (torch.tensor([[limits.max, limits.min, limits.tiny, -0.0]] * 3, dtype=dtype), torch.ones(())):
        assert all_finite(tensor)
        assert all_finite(tensor.expand(2, *tensor.shape).transpose(0, -1))  # whose numbers lie one over the other


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_that_are_no_floating_point_numbers_are_named(broken, dtype, form):
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    folder = broken(lambda tensors: tensors.update({name: tensors[name].to(dtype) for name in names}))
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(QwenModelError, match=r"2 tensors of a type that is not floating-point.*mlp\.up_proj.*norm"):
        read_all(folder)


def test_the_type_is_that_of_most_numbers(broken):
    def change(tensors):
        half = {name: tensor.half() for name, tensor in tensors.items() if "norm" not in name}
        tensors.update({**half, "ids": torch.zeros(10**6, dtype=torch.int64)})

    assert Checkpoint(broken(change)).dtype == "float16"
    assert Checkpoint(broken(lambda tensors: None)).dtype == "float32"
    assert Checkpoint(broken(lambda tensors: tensors.update(tensors | {"x": torch.zeros(10**6).double()}))).dtype == (
        "float32"
    )


def test_more_layers_than_there_are_is_one_line_at_once(folder, tmp_path):
    config = ModelConfig.from_model_dir(folder)
    checkpoint = Checkpoint(folder)
    for layers in (4, 10_000, 2**31 - 1):
        with pytest.raises(QwenModelError, match=rf"says {layers} layers: model\.layers\.{layers - 1}\..* is missing"):
            checkpoint.check(dataclasses.replace(config, num_layers=layers))


@pytest.fixture
def shards(folder, tmp_path):
    """Two shards that hold the same tensors, the second with other numbers, and a function that writes their index."""
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "b.safetensors")

    def write(**changes):
        weight_map = {**dict.fromkeys(tensors, "a.safetensors"), **changes}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path

    return write


@pytest.mark.parametrize("file", ["a.safetensors", "b.safetensors"])
def test_each_tensor_comes_from_the_shard_that_the_index_says(shards, folder, file):
    weights = read_all(shards(**{"lm_head.weight": file}))
    expected = read_all(folder)
    expected["lm_head.weight"] = expected["lm_head.weight"] + (file == "b.safetensors")
    assert_same(weights, expected)


def test_an_index_that_its_shards_do_not_keep(shards):
    with pytest.raises(QwenModelError, match=r"says that b\.safetensors has gone\.weight, which it does not have"):
        Checkpoint(shards(**{"gone.weight": "b.safetensors"}))
    for outside in ("/etc/passwd", "../model.safetensors"):
        with pytest.raises(QwenModelError, match="names a shard outside of its folder"):
            Checkpoint(shards(**{"lm_head.weight": outside}))
    with pytest.raises(QwenModelError, match=r"cannot be read: File name too long"):
        Checkpoint(shards(**{"lm_head.weight": "x" * 300}))
    index = shards() / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}')
    with pytest.raises(QwenModelError, match=r"'lm_head\.weight' has two values"):
        Checkpoint(index.parent)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4995584424\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_recognised(tmp_path, name):
    (tmp_path / name).write_bytes(LFS_POINTER)
    with pytest.raises(QwenModelError, match=rf"{name} is a pointer of Git LFS.*git lfs pull"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK", b"not at all", b"\x80\x02}q\x00.", b"\x80\x04N."])
def test_a_damaged_bin_file_gets_our_own_words(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(QwenModelError, match=r"pytorch_model\.bin cannot be read: it (is damaged|must hold)") as error:
        Checkpoint(tmp_path)
    assert "weights_only" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bin_file_cut_short(tmp_path):
    torch.save({"x": torch.zeros(1000)}, tmp_path / "pytorch_model.bin")
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100):
        (tmp_path / "pytorch_model.bin").write_bytes(content[:length])
        with pytest.raises(QwenModelError, match=r"it is damaged, or not written by torch\.save"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"x": 3}, {1: torch.ones(1)}, {"x": torch.eye(2).to_sparse()}], ids=str
)
def test_bin_files_of_anything_but_dense_tensors(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(QwenModelError, match=r"must hold a dict of tensors|is not a dense tensor"):
        Checkpoint(tmp_path)


def test_one_file_comes_before_an_index_that_was_left(tmp_path):
    folder = save_hugging_face(hugging_face_model("Qwen2ForCausalLM"), tmp_path / "model")
    expected = read_all(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert_same(read_all(folder), expected)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither model.safetensors nor pytorch_model.bin"),
        ({"model.safetensors": b"not at all"}, "model.safetensors cannot be read"),
        ({"model.safetensors.index.json": b"{}"}, "not an index of shards"),
        ({"model.safetensors.index.json": b"[]"}, "must hold a JSON object"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": 1}}'}, "not an index of shards"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}, "gone.safetensors"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(QwenModelError, match=message):
        Checkpoint(tmp_path)


def parallel_model(kind, folder):
    """A checkpoint with twelve query heads, whose sizes many numbers divide; q, k and v apart or in one tensor."""
    if kind == "fused":
        sizes = {"vocab_size": 324, "hidden_size": 96, "intermediate_size": 360, "num_attention_heads": 12}
        return save_reference(*qwen_v1(**sizes, kv_channels=8), folder)
    sizes = {"vocab_size": 324, "hidden_size": 96, "intermediate_size": 180, "num_attention_heads": 12}
    sizes |= {"num_key_value_heads": 4, "attention_bias": True}
    if kind == "llama":
        return save_hugging_face(hugging_face_model("LlamaForCausalLM", mlp_bias=True, **sizes), folder)
    return save_hugging_face(hugging_face_model("Qwen3ForCausalLM", head_dim=8, **sizes), folder)


def part_of(model, name, whole, rank, num_ranks):
    """What Megatron's rules give a device; with fewer key-value heads than devices several have the same one."""
    _, _, module, kind = ("..." + name).rsplit(".", 3)

    def heads(section, count):
        repeats = max(1, num_ranks // count)
        return section.unflatten(0, (count, -1)).repeat_interleave(repeats, 0).chunk(num_ranks)[rank].flatten(0, 1)

    if module == "qkv":
        counts = [model.num_heads, model.num_kv_heads, model.num_kv_heads]
        sections = whole.split([count * model.head_size for count in counts])
        return torch.cat([heads(*each) for each in zip(sections, counts, strict=True)])
    if module == "gate_up":
        return torch.cat([section.chunk(num_ranks)[rank] for section in whole.chunk(2)])
    if module in ("embedding", "lm_head"):
        return whole.chunk(num_ranks)[rank]
    if module in ("output", "down") and kind == "weight":
        return whole.chunk(num_ranks, 1)[rank]
    return whole


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 12])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "fused"])
def test_a_rank_reads_its_part(kind, num_ranks, tmp_path):
    """From each form of file; one that holds other parts alone is not needed."""
    folder = parallel_model(kind, tmp_path / "model")
    model, weights = ModelConfig.from_model_dir(folder), read_all(folder)
    (tmp_path / "bin").mkdir()
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    for checkpoint in (Checkpoint(folder), Checkpoint(folder, "numpy"), Checkpoint(tmp_path / "bin")):
        checkpoint.check(model, num_ranks)
        for spec in (spec for group in weight_groups(model, "float32") for spec in group.specs):
            for rank in range(num_ranks):
                part = torch.as_tensor(checkpoint.read(spec, rank, num_ranks))
                expected = part_of(model, spec.name, weights[spec.name], rank, num_ranks)
                torch.testing.assert_close(part, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "fused"])
def test_tensor_parallel_parts_compute_the_whole(kind, tmp_path):
    """Two devices: the results of their parts of the MLP have the whole as sum, and their heads are its heads."""
    folder = parallel_model(kind, tmp_path / "model")
    model, weights, checkpoint = ModelConfig.from_model_dir(folder), read_all(folder), Checkpoint(folder)
    specs = {spec.name: spec for group in weight_groups(model, "float32") for spec in group.specs}

    def part(name, rank):
        return checkpoint.read(specs[name], rank, 2)

    x = torch.randn(3, model.hidden_size)
    gate, up = (x @ weights["layers.0.mlp.gate_up.weight"].T).chunk(2, -1)
    whole = (torch.nn.functional.silu(gate) * up) @ weights["layers.0.mlp.down.weight"].T
    partial = torch.zeros_like(whole)
    for rank in range(2):
        gate, up = (x @ part("layers.0.mlp.gate_up.weight", rank).T).chunk(2, -1)
        partial += (torch.nn.functional.silu(gate) * up) @ part("layers.0.mlp.down.weight", rank).T
    torch.testing.assert_close(partial, whole)

    qkv = x @ weights["layers.0.attention.qkv.weight"].T + weights["layers.0.attention.qkv.bias"]
    sizes = [model.num_heads * model.head_size] + [model.num_kv_heads * model.head_size] * 2
    ranks = [x @ part("layers.0.attention.qkv.weight", r).T + part("layers.0.attention.qkv.bias", r) for r in range(2)]
    for index, section in enumerate(qkv.split(sizes, -1)):
        halves = [rank.split([size // 2 for size in sizes], -1)[index] for rank in ranks]
        torch.testing.assert_close(torch.cat(halves, -1), section)


@pytest.mark.parametrize(
    ("num_ranks", "problem"),
    [
        (5, "embedding.weight has 324 tokens, which 5 devices"),
        (9, "layers.0.attention.qkv.weight has 12 query heads, which 9 devices"),
        (3, "layers.0.attention.qkv.weight has 4 key-value heads, which 3 devices"),
        (6, "layers.0.attention.qkv.weight has 4 key-value heads, which 6 devices"),
    ],
)
def test_devices_that_cannot_have_equal_parts(num_ranks, problem, tmp_path, monkeypatch):
    """Whole heads count, not rows; the error comes before anything is read."""
    folder = parallel_model("qwen3", tmp_path / "model")
    model, checkpoint = ModelConfig.from_model_dir(folder), Checkpoint(folder)
    specs = {spec.name: spec for group in weight_groups(model, "float32") for spec in group.specs}
    monkeypatch.setattr(Checkpoint, "tensor", None)
    with pytest.raises(QwenModelError, match=f"{problem} cannot share evenly"):
        checkpoint.check(model, num_ranks)
    with pytest.raises(QwenModelError, match=f"{problem} cannot share evenly"):
        checkpoint.read(specs[problem.split()[0]], 0, num_ranks)


def test_an_uneven_mlp_and_ranks_that_do_not_exist(folder):
    model, checkpoint = ModelConfig.from_model_dir(folder), Checkpoint(folder)
    (spec,) = (spec for spec in weight_groups(model, "float32")[1].specs if spec.name == "layers.0.mlp.down.weight")
    with pytest.raises(QwenModelError, match=r"mlp\.down\.weight has 172 MLP channels, which 3 devices cannot"):
        checkpoint.read(spec, 0, 3)
    for rank, num_ranks in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(QwenModelError, match=rf"rank must be 0 to num_ranks - 1, not {rank} of {num_ranks}"):
            checkpoint.read(spec, rank, num_ranks)


@pytest.mark.parametrize("form", ["torch", "numpy", "bin"])
def test_a_rank_reads_no_other_part(form, broken):
    """A number that is not finite stops the ranks that have it, and no other."""
    folder = broken(lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].__setitem__((-1, 0), math.nan))
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    model, checkpoint = ModelConfig.from_model_dir(folder), Checkpoint(folder, "numpy" if form == "numpy" else "torch")
    spec = weight_groups(model, "float32")[1].modules["layers.0.mlp.gate_up"].weight
    assert checkpoint.read(spec, 0, 2).shape == (172, 84)
    for parts in ((1, 2), (0, 1)):
        with pytest.raises(QwenModelError, match=r"up_proj\.weight has numbers that are not finite"):
            checkpoint.read(spec, *parts)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_weights_that_join_and_divide_along_columns(framework, tmp_path):
    """As packed weights do that have a column for each output."""
    tensors = {name: torch.randn(6, columns) for name, columns in (("q", 8), ("k", 4), ("v", 4))}
    save_file(tensors, tmp_path / "model.safetensors")
    sections = {"q": Section(8, 4, "query heads"), "k": Section(4, 2, "key-value heads", repeated=True)}
    sections["v"] = sections["k"]
    sources = tuple(Source(name, tuple(tensors[name].shape), (sections[name],)) for name in "qkv")
    spec, checkpoint = WeightSpec("qkv.weight", sources, "float32", axis=1), Checkpoint(tmp_path, framework)
    assert spec.shape == (6, 16)
    whole = torch.as_tensor(checkpoint.read(spec))
    assert torch.equal(whole, torch.cat([tensors[name] for name in "qkv"], 1))
    for rank in range(4):
        kv = slice(rank // 2 * 2, rank // 2 * 2 + 2)  # two devices share a head
        expected = [tensors["q"][:, rank * 2 : rank * 2 + 2], tensors["k"][:, kv], tensors["v"][:, kv]]
        assert torch.equal(torch.as_tensor(checkpoint.read(spec, rank, 4)), torch.cat(expected, 1))
