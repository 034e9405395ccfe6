"""Graphs of plug-ins, parsed as TensorRT's parser does, in the TensorRT back end."""

import numpy as np
import pytest

import qwen_model
from qwen_model.engine.export import export_onnx
from tests import stand_ins
from tests.qwen_model import model_files
from tests.qwen_model.model_files import random_prompt
from tests.qwen_model.tensorrt_reference import ARCHITECTURES, save_model
from tests.support.plugin_fields import FIELDS, key_of

onnx = pytest.importorskip("onnx")

LIMITS = {"max_batch_size": 6, "max_input_len": 120, "max_output_len": 40}


def parse(network, model, trt):
    """Add the nodes of a model to a TensorRT network."""
    from qwen_plugins.tensorrt import constant, layers

    types = {onnx.TensorProto.FLOAT: trt.float32, onnx.TensorProto.INT32: trt.int32}
    tensors = {}
    for given in model.graph.input:
        sizes = [-1 if size.dim_param else size.dim_value for size in given.type.tensor_type.shape.dim]
        tensors[given.name] = network.add_input(given.name, types[given.type.tensor_type.elem_type], tuple(sizes))
    for weight in model.graph.initializer:
        array = onnx.numpy_helper.to_array(weight)
        tensors[weight.name] = constant(network, array, types[weight.data_type], f"{weight.name} constant")
    for node in model.graph.node:
        inputs = [tensors[name] for name in node.input]
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Gather":
            outputs = [network.add_gather(*inputs, attributes["axis"]).get_output(0)]
        else:
            assert node.domain == attributes.pop("plugin_namespace").decode() == "qwen_plugins"
            version = attributes.pop("plugin_version").decode()
            outputs = layers.add_plugin(network, node.op_type, inputs, attributes, node.name, [], version)
        tensors |= zip(node.output, outputs, strict=True)
    for output in model.graph.output:
        tensors[output.name].name = output.name
        network.mark_output(tensors[output.name])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_device_runs_a_plan_of_the_file(architecture, tmp_path, monkeypatch):
    """The plan has the inputs, profiles and outputs that the Device binds; tokens and logits are torch's."""
    checkpoint = save_model(architecture, tmp_path / "model")
    export_onnx(checkpoint, output=tmp_path / "model.onnx", dtype="float32", **LIMITS)
    onnx.checker.check_model(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    qwen_model.build_engine(checkpoint, output_dir=tmp_path / "torch", dtype="float32", **LIMITS)
    expected = qwen_model.load_engine(tmp_path / "torch", device="cpu")
    with stand_ins.installed("11.1.0") as trt:
        monkeypatch.setattr(
            "qwen_model.backends.tensorrt.back_end._define", lambda network, *_: parse(network, model, trt)
        )
        qwen_model.build_engine(
            checkpoint, output_dir=tmp_path / "engine", backend="tensorrt", dtype="float32", **LIMITS
        )
        session = qwen_model.load_engine(tmp_path / "engine")
        prompts = [random_prompt(length, seed=length) for length in (1, 30, 70)]
        tokens = [output.output_ids for output in session.generate(prompts, max_new_tokens=20).outputs]
        logits = session.logits(prompts[2])
    assert tokens == [output.output_ids for output in expected.generate(prompts, max_new_tokens=20).outputs]
    np.testing.assert_allclose(logits, expected.logits(prompts[2]), atol=5e-4)


def test_nodes_have_every_field(tmp_path):
    """TensorRT's parser warns of each that is missing; `kernels`, which were measured on one GPU, are left out."""
    export_onnx(output=tmp_path / "model.onnx")
    for node in onnx.load(tmp_path / "model.onnx").graph.node:
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.domain:
            fields = FIELDS[key_of(node.op_type, given["plugin_version"].decode())]
            assert fields - given.keys() <= {"kernels"}
            assert given.keys() - fields == {"plugin_version", "plugin_namespace"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types(dtype, tmp_path):
    """Weights, cache and logits have the type; the plug-ins are told its number."""
    summary = export_onnx(output=tmp_path / "model.onnx", dtype=dtype)
    onnx.checker.check_model(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert {onnx.TensorProto.DataType.Name(weight.data_type) for weight in graph.initializer} == {
        dtype.replace("float32", "float").upper()
    }
    described = {tensor.name: tensor.dtype for tensor in (*summary.written.inputs, *summary.written.outputs)}
    assert {described["logits"], described["past_key_value_0"], described["present_key_value_5"]} == {dtype}
    type_ids = {a.i for node in graph.node for a in node.attribute if a.name == "type_id"}
    assert type_ids == {{"float32": 0, "float16": 1, "bfloat16": 7}[dtype]}


@pytest.mark.parametrize(("kv_cache_dtype", "number"), [("int8", 1), ("fp8", 2)])
def test_caches_of_8_bits(kv_cache_dtype, number, tmp_path):
    summary = export_onnx(output=tmp_path / "model.onnx", kv_cache_dtype=kv_cache_dtype)
    onnx.checker.check_model(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = {a.i for node in graph.node for a in node.attribute if a.name == "kv_cache_type"}
    assert kinds == {number}
    described = {tensor.name: tensor for tensor in (*summary.written.inputs, *summary.written.outputs)}
    for name in ("past_key_value_0", "present_key_value_5"):
        assert (described[name].dtype, described[name].shape) == ("int32", ("num_pages", 2 * 2 * 64 * (64 // 4 + 1)))


def test_the_tied_head_is_the_embeddings_table(tmp_path):
    model = model_files.hugging_face_model("Qwen2ForCausalLM", hidden_size=192, tie_word_embeddings=True)
    export_onnx(model_files.save_hugging_face(model, tmp_path / "model"), output=tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    users = [node.name for node in graph.node if "embedding.weight" in node.input]
    assert users == ["embedding/Gather", "lm_head"]
    assert [weight.name for weight in graph.initializer].count("embedding.weight") == 1


def test_no_operator_of_onnx_has_a_plugins_name(tmp_path):
    """Some parsers look at the name alone."""
    export_onnx(output=tmp_path / "model.onnx")
    plugins = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node if node.domain}
    assert plugins == {"RmsNorm", "QwenGemm", "GptAttention"}
    assert not plugins & {schema.name for schema in onnx.defs.get_all_schemas()}


def test_heads_that_the_plugin_does_not_take(tmp_path):
    checkpoint = model_files.save_hugging_face(model_files.hugging_face_model("LlamaForCausalLM"), tmp_path / "model")
    with pytest.raises(qwen_model.QwenModelError, match=r"heads of 32, 64, .* has 14: use --operators standard"):
        export_onnx(checkpoint, output=tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx*"))
