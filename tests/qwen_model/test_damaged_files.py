"""Whatever is in the files that a user gives, the answer is an engine that runs or one line, in bounded time."""

import contextlib
import copy
import datetime
import io
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

import qwen_model
from qwen_model import QwenModelError
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import hugging_face_model, save_hugging_face

LIMITS = {"dtype": "float32", "max_batch_size": 1, "max_input_len": 40, "max_output_len": 4}
LONGEST_LINE = 2000
DEEP = "@deep@"  # stands for more brackets than JSON's readers follow

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)
EVERY_FILE = (*JSON_FILES, "chat_template.jinja", "a.safetensors", "b.safetensors")

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 400),
    st.sampled_from(
        [2**31, 2**63, 10**30, 10**400, -(10**400), 1e308, 1e-320, DEEP, "\ud800", "a\nb", "\0", "x" * 300]
    ),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 2**64), max_size=3),
    st.dictionaries(st.sampled_from(["content", "type", "factor", "x"]), st.integers() | st.text(), max_size=2),
)


class Files(dict):
    """The content of each file by its name; too much to be printed."""

    def __repr__(self):
        return f"<{len(self)} files>"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint in two shards with a byte tokenizer and a chat template: the content of each file by its name."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    save_hugging_face(hugging_face_model("Qwen2ForCausalLM", **sizes, **heads, rope_parameters=rope), folder)
    tensors = load_file(folder / "model.safetensors")
    parts = {"a.safetensors": sorted(tensors)[:7], "b.safetensors": sorted(tensors)[7:]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_byte_tokenizer(folder)
    added = {"256": {"content": "<|im_start|>", "special": True}, "257": {"content": "<|im_end|>", "special": True}}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": added, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "<|im_end|>", "lstrip": false}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 257], "temperature": 0.7, "top_k": 20}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    return Files((path.name, path.read_bytes()) for path in folder.iterdir())


@contextlib.contextmanager
def written(files):
    """The files in a temporary folder; what is done with them may end in QwenModelError of one line."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            path = Path(name) / "model" / file
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content)
        try:
            yield Path(name) / "model"
        except QwenModelError as error:
            line = str(error).replace(name, "")
            assert "\n" not in line
            assert len(line) < LONGEST_LINE


def run(engine):
    session = qwen_model.load_engine(engine, device="cpu")
    session.generate("a", max_new_tokens=2)
    session.generate("a", max_new_tokens=2, chat=True)


def use(files):
    """Build an engine of the files, load it and run it."""
    with written(files) as model:
        qwen_model.build_engine(model, output_dir=model.parent / "engine", **LIMITS)
        run(model.parent / "engine")


@pytest.fixture(scope="module")
def engine(files):
    """An engine of that checkpoint: the content of each file by its path."""
    with written(files) as model:
        folder = model.parent / "engine"
        qwen_model.build_engine(model, output_dir=folder, **LIMITS)
        found = [path for path in folder.rglob("*") if path.is_file()]
        return Files((str(path.relative_to(folder)), path.read_bytes()) for path in found)


def places(value, path=()):
    """The paths of everything in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def changed_json(draw, content):
    """JSON in which a few values are replaced, taken out, or renamed."""
    value = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        every = [path for path in places(value) if path]
        if not every:
            break
        *path, last = draw(st.sampled_from(every))
        parent = value
        for key in path:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if action == "replace":
            parent[last] = draw(values)
        else:
            child = parent.pop(last)
            if action == "rename" and isinstance(parent, dict):
                parent[draw(st.text(max_size=3))] = child
    text = json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


@st.composite
def changed_bytes(draw, content, most=400):
    """Bytes of which a piece near the beginning is cut out, put in, or replaced, or of which the end is missing."""
    start = draw(st.integers(0, min(len(content), most)))
    action = draw(st.sampled_from(["cut", "put", "replace", "end"]))
    piece = draw(st.binary(max_size=9) | st.sampled_from([b"\xef\xbb\xbf", b"\xff", b"{", b'"', b"9" * 30, b"\0" * 9]))
    if action == "end":
        return content[:start]
    end = start if action == "put" else start + len(piece)
    return content[:start] + (b"" if action == "cut" else piece) + content[end:]


bounded = settings(
    max_examples=100,
    deadline=datetime.timedelta(seconds=20),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", JSON_FILES)
@bounded
@given(data=st.data())
def test_changed_settings(files, name, data):
    use({**files, name: data.draw(changed_json(json.loads(files[name])))})


@pytest.mark.parametrize("name", EVERY_FILE)
@bounded
@given(data=st.data())
def test_changed_bytes(files, name, data):
    use({**files, name: data.draw(changed_bytes(files[name]))})


@pytest.mark.parametrize("name", ["a.safetensors", "b.safetensors"])
@bounded
@given(data=st.data())
def test_changed_headers_of_safetensors(files, name, data):
    length = int.from_bytes(files[name][:8], "little")
    header = data.draw(changed_json(json.loads(files[name][8 : 8 + length])))
    use({**files, name: len(header).to_bytes(8, "little") + header + files[name][8 + length :]})


@pytest.mark.parametrize("zipped", [True, False])
@bounded
@given(data=st.data())
def test_changed_files_of_pytorch(files, zipped, data):
    """The form of today, and that of before PyTorch 1.6."""
    tensors = {name: tensor for part in ("a", "b") for name, tensor in load(files[f"{part}.safetensors"]).items()}
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
    content = data.draw(changed_bytes(buffer.getvalue(), most=len(buffer.getvalue())))
    kept = {name: kept for name, kept in files.items() if "safetensors" not in name}
    use({**kept, "pytorch_model.bin": content})


@bounded
@given(data=st.data())
def test_changed_settings_of_an_engine(engine, data):
    with written({**engine, "config.json": data.draw(changed_json(json.loads(engine["config.json"])))}) as folder:
        run(folder)


@pytest.mark.parametrize("name", EVERY_FILE)
def test_files_that_are_not_text_or_json(files, name):
    for content in (
        b"",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf",
        b"null",
        b"[]",
        b"3",
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"\0" * 99,
    ):
        use({**files, name: content})


def test_a_mark_of_utf8_is_no_fault(files):
    """Some editors put it first."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            mark = b"\xef\xbb\xbf" if file in (*JSON_FILES, "chat_template.jinja") and file != "tokenizer.json" else b""
            (Path(name) / file).write_bytes(mark + content)
        qwen_model.build_engine(name, output_dir=f"{name}.engine", **LIMITS)
