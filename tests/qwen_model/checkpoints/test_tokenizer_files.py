"""Tokenizer files that nobody wrote so: whatever is in them gives a tokenizer that works, or one clear error."""

import base64
import json
import shutil

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_model.checkpoints.tokenizer import copy_tokenizer_files, load_tokenizer
from qwen_model.common.errors import QwenModelError
from tests.qwen_model.conftest import save_byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
TOKEN = {"content": "<x>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
FILES = {
    "tokenizer_config.json": {
        "eos_token": "<|im_end|>",
        "pad_token": TOKEN,
        "added_tokens_decoder": {"256": {**TOKEN, "content": "<|im_start|>"}, "258": TOKEN},
        "additional_special_tokens": ["<y>"],
        "extra_special_tokens": {"image_token": "<z>"},
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": TEMPLATE}],
    },
    "special_tokens_map.json": {"eos_token": TOKEN, "additional_special_tokens": ["<y>", TOKEN]},
    "added_tokens.json": {"<x>": 258, "<y>": 259},
}
WORDS = ["", "<x>", "<|im_end|>", "\x00", "\ud800", "a b", "é", "{{", "{% for %}", "{{ messages[9].x.y }}", "default"]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 257, 2**31, 2**63, 10**40, 1e308, float("inf"), float("nan")]),
    st.sampled_from(WORDS),
    st.sampled_from(
        [[], {}, [[]], [None], {"content": None}, {"content": 3}, ["<x>"], {"": ""}, {"-1": TOKEN}, {"x": TOKEN}]
    ),
    st.builds(lambda name: {"258": {**TOKEN, name: "x"}}, st.sampled_from(list(TOKEN))),
)


def places(value, path=()):
    """The paths of all values inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(value, path, odd):
    if not path:
        return odd
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], odd)
    return copy


def use(folder):
    """Does all that a build, a load and a chat do with a tokenizer; a QwenModelError of one line is fine."""
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.check_chat_templates()
        ids = tokenizer.encode("Hello <x> wörld<|im_end|> 你")
        tokenizer.decode(ids)
        tokenizer.decode([*ids, 2**31, tokenizer.vocab_size], skip_special_tokens=False)
        "".join(map(tokenizer.stream_decoder().push, ids))
        tokenizer.chat_end_token_ids()
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    except QwenModelError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = save_byte_tokenizer(tmp_path_factory.mktemp("sound"))
    for name, content in FILES.items():
        (folder / name).write_text(json.dumps(content))
    use(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "tokenizer")


quick = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("legacy", [False, True])
@given(data=st.data())
@quick
def test_configurations_with_an_odd_value(folder, name, legacy, data):
    content = dict(FILES[name])
    path = data.draw(st.sampled_from(places(content)))
    (folder / name).write_text(json.dumps(changed(content, path, data.draw(ODD))))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if legacy and isinstance(config, dict):
        config.pop("added_tokens_decoder", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    use(folder)


@given(data=st.data())
@quick
def test_tokenizers_with_an_odd_value(folder, sound, data):
    content = json.loads((sound / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {}
    path = data.draw(st.sampled_from(places(content)))
    content["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(changed(content, path, data.draw(ODD))))
    use(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", *FILES, "chat_template.jinja"])
@given(data=st.data())
@quick
def test_files_with_other_bytes(folder, sound, name, data):
    content = (sound / name).read_bytes() if name != "chat_template.jinja" else TEMPLATE.encode()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 20)) | st.just(len(content)))
    (folder / name).write_bytes(content[:start] + data.draw(st.binary(max_size=4)) + content[end:])
    use(folder)


@given(data=st.data())
@quick
def test_tiktoken_files_with_other_bytes(tmp_path, data):
    ranks = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    content = b"\n".join(ranks)
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 20)) | st.just(len(content)))
    (tmp_path / "qwen.tiktoken").write_bytes(content[:start] + data.draw(st.binary(max_size=4)) + content[end:])
    use(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "chat_template.jinja"])
def test_folders_and_unreadable_files_in_their_place(sound, tmp_path, name):
    for kind in ("folder", "loop"):
        folder, engine = shutil.copytree(sound, tmp_path / kind), tmp_path / f"{kind}.engine"
        engine.mkdir()
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir() if kind == "folder" else (folder / name).symlink_to(name)
        if kind == "folder":
            copy_tokenizer_files(folder, engine)
        else:
            with pytest.raises(QwenModelError, match=f"{name} cannot be read: Too many levels of symbolic links"):
                copy_tokenizer_files(folder, engine)
        use(folder)
