"""The files of an export: what is in which, what is replaced, and what is left where an export fails."""

import weakref

import numpy as np
import pytest

import qwen_model
from qwen_model.checkpoints.checkpoint import Checkpoint
from qwen_model.engine.export import export_onnx
from tests.qwen_model import model_files

onnx = pytest.importorskip("onnx")


@pytest.fixture
def large(monkeypatch):
    """Every model is one whose weights go to a file of their own."""
    monkeypatch.setattr("qwen_model.backends.onnx.export.LARGEST_MODEL", 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = model_files.hugging_face_model("Qwen2ForCausalLM", hidden_size=192)
    return model_files.save_hugging_face(model, tmp_path_factory.mktemp("model"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("operators", ["plugins", "standard"])
def test_large_weights_are_beside_the_model(operators, checkpoint, tmp_path, monkeypatch):
    export_onnx(checkpoint, output=tmp_path / "small.onnx", operators=operators)
    monkeypatch.setattr("qwen_model.backends.onnx.export.LARGEST_MODEL", 0)
    summary = export_onnx(checkpoint, output=tmp_path / "large.onnx", operators=operators)
    assert names(tmp_path) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert summary.written.weights_file == tmp_path / "large.onnx.data"
    assert summary.written.num_bytes == sum((tmp_path / name).stat().st_size for name in names(tmp_path)[:2])
    onnx.checker.check_model(tmp_path / "large.onnx")
    small, large = (onnx.load(tmp_path / name).graph for name in ("small.onnx", "large.onnx"))
    for one, other in zip(small.initializer, large.initializer, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other))
    assert (tmp_path / "large.onnx").stat().st_size < 100_000


def test_one_weight_at_a_time_is_in_memory(checkpoint, tmp_path, monkeypatch, large):
    read, before = Checkpoint.read, []

    def watched(self, spec):
        assert not [name for name, array in before if array() is not None]
        array = read(self, spec)
        before.append((spec.name, weakref.ref(array)))
        return array

    monkeypatch.setattr(Checkpoint, "read", watched)
    export_onnx(checkpoint, output=tmp_path / "model.onnx")
    assert len(before) == len({name for name, _ in before}) > 20


def test_an_earlier_export_is_replaced(checkpoint, tmp_path, monkeypatch):
    place = tmp_path / "model.onnx"
    monkeypatch.setattr("qwen_model.backends.onnx.export.LARGEST_MODEL", 0)
    export_onnx(checkpoint, output=place)
    export_onnx(checkpoint, output=place, dtype="float16")
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert {weight.data_type for weight in onnx.load(place).graph.initializer} == {onnx.TensorProto.FLOAT16}
    monkeypatch.undo()
    export_onnx(checkpoint, output=place)
    assert names(tmp_path) == ["model.onnx"]
    onnx.load(place)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_other_files_are_not_replaced(name, checkpoint, tmp_path, large):
    """A model of another program, a text, a folder, a link."""
    other = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name="pytorch")
    path = tmp_path / name
    for make in (
        lambda: path.write_bytes(other.SerializeToString()),
        lambda: path.write_text("mine"),
        path.touch,
        path.mkdir,
        lambda: path.symlink_to(tmp_path / "nothing"),
    ):
        make()
        with pytest.raises(qwen_model.QwenModelError, match=f"{name} already exists and no export wrote it"):
            export_onnx(checkpoint, output=tmp_path / "model.onnx")
        assert names(tmp_path) == [name]
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_file_that_comes_meanwhile_is_not_replaced(checkpoint, tmp_path, large):
    def progress(phase, done, total):
        (tmp_path / "model.onnx.data").write_text("mine")

    with pytest.raises(qwen_model.QwenModelError, match=r"model.onnx.data already exists"):
        export_onnx(checkpoint, output=tmp_path / "model.onnx", progress=progress)
    assert names(tmp_path) == ["model.onnx.data"]
    assert (tmp_path / "model.onnx.data").read_text() == "mine"


def test_a_second_export_to_the_same_file_is_refused(checkpoint, tmp_path, large):
    def progress(phase, done, total):
        with pytest.raises(qwen_model.QwenModelError, match=r"another command .* is writing .*model.onnx: wait"):
            export_onnx(checkpoint, output=tmp_path / "model.onnx")

    export_onnx(checkpoint, output=tmp_path / "model.onnx", progress=progress)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    onnx.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failure_changes_nothing(error, checkpoint, tmp_path, monkeypatch, large):
    place = tmp_path / "model.onnx"
    export_onnx(checkpoint, output=place)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    replace = type(place).rename

    def fails(self, target):
        if target == place and self.parent.name != "old":  # the last of the moves
            raise error
        return replace(self, target)

    monkeypatch.setattr(type(place), "rename", fails)
    with pytest.raises((KeyboardInterrupt, qwen_model.QwenModelError)) as raised:
        export_onnx(checkpoint, output=place, dtype="float16")
    if isinstance(error, OSError):
        assert "model.onnx cannot be written: No space left on device" in str(raised.value)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_number_too_large_for_the_type(tmp_path):
    import torch

    model = model_files.hugging_face_model("Qwen2ForCausalLM", hidden_size=192)
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    folder = model_files.save_hugging_face(model, tmp_path / "model")
    with pytest.raises(qwen_model.QwenModelError, match=r"final_norm.weight has numbers up to 1e\+05.*float16 cannot"):
        export_onnx(folder, output=tmp_path / "model.onnx", dtype="float16")
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "model.pb"}, r"name ends in .onnx, not model.pb"),
        ({"output": "no/model.onnx"}, r"there is no folder no"),
        ({"output": "a\0b.onnx"}, "null byte"),
        ({"operators": "all"}, "operators must be one of plugins, standard, not 'all'"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32"),
        ({"operators": "standard", "max_batch_size": 4}, "standard operators take any sizes"),
        ({"max_input_len": 0}, "max_input_len must be a positive integer"),
        ({"model_dir": "nothing"}, "nothing"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qwen_model.QwenModelError, match=message):
        export_onnx(**{"output": "model.onnx", **arguments})
    assert names(tmp_path) == []


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(qwen_model.QwenModelError, match=r'the ONNX export needs onnx.*"qwen-plugins\[onnx\]"'):
        export_onnx(output=tmp_path / "model.onnx")
