"""The tokenizers against transformers and tiktoken's own pieces, and the decoding of a stream."""

import base64
import inspect
import json
import random
import threading
import time
import unicodedata
from types import SimpleNamespace

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("tiktoken")

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen_model.checkpoints.chat_template import ChatOptions
from qwen_model.checkpoints.hugging_face_tokenizer import LONG_TEXT, HuggingFaceTokenizer
from qwen_model.checkpoints.tokenizer import QWEN_SPLIT_PATTERN, copy_tokenizer_files, load_tokenizer
from qwen_model.common.errors import QwenModelError

TEXTS = [
    "",
    "Hello, world! It's 3:45 pm.",
    "  two leading spaces, two trailing  ",
    "你好，世界！今天天气怎么样？",
    "naïve café — “quoted” … Ünïcödé",
    "def f(x: int) -> int:\n    return x ** 2  # square\n\n\tif x:\r\n",
    "👋🏽 family: 👨‍👩‍👧‍👦 flags: 🇩🇪🇯🇵",
    "مرحبا بالعالم שלום עולם नमस्ते 한국어 ไทย",
    "e\u0301 is composed by NFC",
    "a\x00b\x7f\u200b\ufeff",
    "\ufffd a replacement character of the text's own",
]
VALID_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory):
    """A tokenizer in the form of Qwen2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    return _write(tmp_path_factory.mktemp("byte_level"), tokenizer, config)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    """A tokenizer in the form of LLaMA 2's: words open with a ▁, unknown characters are bytes, <s> comes first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = "▁abcdefghijklmnopqrstuvwxyzHTI.,!?0123456789"
    merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o"), ("▁", "▁"), ("t", "h")]
    pieces += [*letters, *(first + second for first, second in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.enable_truncation(4)  # as some files have it; transformers ignores it
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": [
            {"name": "tool_use", "template": "unused"},
            {
                "name": "default",
                "template": "{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'user' %}\n"
                "[INST] {{ m['content'] | trim }} [/INST]{% elif m['role'] == 'assistant' %}"
                "{% generation %} {{ m['content'] }} {{ eos_token }}{% endgeneration %}"
                "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}",
            },
        ],
    }
    return _write(tmp_path_factory.mktemp("sentencepiece"), tokenizer, config)


@pytest.fixture(scope="module")
def tiktoken_dir(tmp_path_factory):
    """A ``qwen.tiktoken`` of all bytes and some merges."""
    merged = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", "你".encode(), b"im", b"<|"]
    merged[9:9] = ["你".encode()[:2]]
    tokens = [bytes([byte]) for byte in range(256)] + merged
    folder = tmp_path_factory.mktemp("tiktoken")
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(params=["byte_level_dir", "sentencepiece_dir", "tiktoken_dir"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


def _write(folder, tokenizer, config):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _stream(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer, text):
    ids = tokenizer.encode(f"{text} {list(tokenizer.special_tokens)[-1]}", add_special_tokens=False)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() in (decoded, f" {decoded}")  # LLaMA's opens with a space


def test_an_unknown_token_has_no_bytes(tokenizer):
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(1 << 30) == b""


@pytest.mark.parametrize("folder", ["byte_level_dir", "sentencepiece_dir"])
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_agrees_with_transformers(request, folder, add_special_tokens):
    transformers = pytest.importorskip("transformers")
    model_dir = request.getfixturevalue(folder)
    ours, theirs = load_tokenizer(model_dir), transformers.AutoTokenizer.from_pretrained(model_dir)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    for text in [*TEXTS, "a<|im_end|>b <s>c</s>"]:
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_chat_template_agrees_with_transformers(sentencepiece_dir):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(sentencepiece_dir), transformers.AutoTokenizer.from_pretrained(sentencepiece_dir)
    messages = [
        {"role": "user", "content": " hello "},
        {"role": "assistant", "content": "hi\n there"},
        {"role": "user", "content": "你好"},
    ]
    for add_generation_prompt in (True, False):
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False, tokenize=True
        )
        assert ours.apply_chat_template(messages, add_generation_prompt) == expected


@given(text=VALID_TEXT)
@settings(deadline=None, max_examples=60)
def test_byte_level_round_trip(byte_level_dir, text):
    tokenizer = load_tokenizer(byte_level_dir)
    assert tokenizer.decode(tokenizer.encode(text, parse_special_tokens=False)) == unicodedata.normalize("NFC", text)


@given(text=VALID_TEXT)
@settings(deadline=None, max_examples=60)
def test_tiktoken_round_trip(tiktoken_dir, text):
    tokenizer = load_tokenizer(tiktoken_dir)
    assert tokenizer.decode(tokenizer.encode(text, parse_special_tokens=False)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_whole_text_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = _stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("folder", ["byte_level_dir", "tiktoken_dir"])
@given(seed=st.integers(0, 2**32), length=st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_stream_of_random_ids_equals_decode(request, folder, seed, length):
    """Random ids are mostly broken UTF-8, with special tokens in between."""
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=length)
    assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_keeps_spaces_that_the_tokenizer_strips_at_the_beginning(sentencepiece_dir):
    tokenizer = load_tokenizer(sentencepiece_dir)
    hello, end = tokenizer.encode("hello", add_special_tokens=False), [2]
    space = tokenizer.encode("a b", add_special_tokens=False)[2:3]
    ids = [*hello, *end, *hello, *space, *hello]
    assert tokenizer.decode(ids) == "hello hello  hello"
    assert "".join(_stream(tokenizer, ids)) == "hello hello  hello"


def test_stream_holds_half_an_emoji_back_and_flush_gives_it(tokenizer):
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    decoder = tokenizer.stream_decoder()
    shown = "".join(decoder.push(token_id) for token_id in ids[:-1])
    assert "\ufffd" not in shown
    assert shown + decoder.flush() == tokenizer.decode(ids[:-1])
    assert decoder.flush() == ""


def test_tiktoken_special_tokens(tiktoken_dir):
    tokenizer = load_tokenizer(tiktoken_dir)
    first = tokenizer.encode("<|endoftext|>")[0]
    assert first == 256 + 13
    assert tokenizer.encode("<|im_start|><|im_end|>") == [first + 1, first + 2]
    assert tokenizer.encode("<|extra_0|><|extra_204|>") == [first + 3, first + 207]
    assert tokenizer.vocab_size == first + 208
    assert tokenizer.eos_token_ids == (first, first + 2)
    assert tokenizer.decode([first + 1, *tokenizer.encode("hello"), first + 2]) == "hello"
    assert tokenizer.decode([first + 2], skip_special_tokens=False) == "<|im_end|>"


def test_tiktoken_merges_in_the_order_of_the_ranks(tiktoken_dir):
    tokenizer = load_tokenizer(tiktoken_dir)
    assert tokenizer.encode("hello world") == [256 + 3, 256 + 8]
    assert tokenizer.encode("你") == [256 + 10]


def test_ids_of_no_token_decode_to_nothing(tokenizer):
    """A model's embedding has often more rows than its tokenizer has tokens."""
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == "hello"


@pytest.mark.parametrize("parse_special_tokens", [True, False])
@pytest.mark.parametrize("folder", ["byte_level_dir", "sentencepiece_dir"])
def test_long_texts_are_encoded_as_short_ones(request, folder, parse_special_tokens):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    text = "".join(TEXTS) * (1 + LONG_TEXT // len("".join(TEXTS)))
    for add_special_tokens in (True, False):
        found = tokenizer.encode(text, add_special_tokens, parse_special_tokens)
        assert found == tokenizer._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


@pytest.mark.parametrize("folder", ["byte_level_dir", "tiktoken_dir"])
def test_control_tokens_in_a_text_can_be_ordinary_text(request, folder):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    assert len(tokenizer.encode("<|im_end|>")) == 1
    ids = tokenizer.encode("<|im_end|>", parse_special_tokens=False)
    assert len(ids) > 1
    assert tokenizer.decode(ids) == "<|im_end|>"
    assert len(tokenizer.encode("<|im_end|>")) == 1


@pytest.mark.parametrize("folder", ["byte_level_dir", "tiktoken_dir"])
def test_chatml_where_there_is_no_template(request, folder):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    own_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(own_system, add_generation_prompt=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    )
    assert tokenizer.encode("<|im_end|>")[0] in tokenizer.chat_end_token_ids()


def test_control_tokens_in_a_qwen_v1_chat_are_ordinary_text(tiktoken_dir):
    tokenizer = load_tokenizer(tiktoken_dir)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(tokenizer.encode("<|im_end|>")[0]) == 2  # the system message's and the user message's own


def test_template_in_its_own_file_comes_first(byte_level_dir, tmp_path):
    copy_tokenizer_files(byte_level_dir, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] | tojson }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "你 <&>"}])) == '"你 <&>"'


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        (["hello"], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "system", "content": "x"}], "no system here"),
    ],
)
def test_chat_errors(sentencepiece_dir, messages, message):
    with pytest.raises(QwenModelError, match=message):
        load_tokenizer(sentencepiece_dir).apply_chat_template(messages)


@pytest.mark.parametrize("content", [None, 5, [{"type": "image"}], [{"type": "text", "text": 5}], ["x"]])
@pytest.mark.parametrize("folder", ["byte_level_dir", "tiktoken_dir"])
def test_contents_that_are_no_text(request, folder, content):
    tokenizer = load_tokenizer(request.getfixturevalue(folder))
    with pytest.raises(QwenModelError, match=r"chat template failed|must be strings|message 0 must be"):
        tokenizer.apply_chat_template([{"role": "user", "content": content}])


@pytest.mark.parametrize("expression", ["'a' * 10**10", "10**9 * [1]", "10**10**10", "range(10**9) | list"])
def test_templates_that_would_take_all_memory(byte_level_dir, tmp_path, expression):
    template = "{{ 2 * 3 }} {{ '-' * 3 }} {{ 2 ** 3 }} {{ " + expression + " }}"
    copy_tokenizer_files(byte_level_dir, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(QwenModelError, match=r"too (large|big)"):
        load_tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "Hi"}])


def test_templates_run_in_a_sandbox(byte_level_dir, tmp_path):
    copy_tokenizer_files(byte_level_dir, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(QwenModelError, match="chat template failed"):
        load_tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])


def test_no_template_and_no_chatml(sentencepiece_dir, tmp_path):
    copy_tokenizer_files(sentencepiece_dir, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == ()
    with pytest.raises(QwenModelError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_copied_files_make_the_same_tokenizer(tokenizer, request, tmp_path):
    source = request.getfixturevalue(request.node.callspec.params["tokenizer"])
    assert copy_tokenizer_files(source, tmp_path)
    copied = load_tokenizer(tmp_path)
    assert [copied.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert copied.eos_token_ids == tokenizer.eos_token_ids


def test_folder_without_a_tokenizer(tmp_path):
    assert copy_tokenizer_files(tmp_path, tmp_path) == []
    with pytest.raises(QwenModelError, match=r"tokenizer\.json and qwen\.tiktoken"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(QwenModelError, match="AutoTokenizer"):
        load_tokenizer(tmp_path)


def _added(content, **flags):
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True, **flags}
    return {"content": content, **flags}


ADDED_TEXTS = [
    "a<tool>b",
    "a <tool> b<|im_end|>",
    " <left> x<right> y",
    "word inside words and word",
    "<plain>x<|im_start|>",
    "[PAD]<extra><more><image>",
    "a ll he hello",
]
ADDED_CONFIGS = {
    "known there alone": {
        "eos_token": "<tool>",
        "added_tokens_decoder": {"403": _added("<tool>"), "404": _added("<plain>", special=False, normalized=True)},
    },
    "flags": {
        "added_tokens_decoder": {
            "403": _added("<left>", lstrip=True),
            "404": _added("<right>", rstrip=True, special=False),
            "405": _added("word", single_word=True, special=False),
        },
    },
    "special there alone": {"added_tokens_decoder": {"400": _added("<|endoftext|>"), "402": _added("<|im_end|>")}},
    "not special there": {"added_tokens_decoder": {"401": _added("<|im_start|>", special=False)}},
    "out of order": {"added_tokens_decoder": {"410": _added("<tool>"), "404": _added("<plain>")}},
    "named tokens alone": {
        "pad_token": "[PAD]",
        "eos_token": {"__type": "AddedToken", **_added("<|im_end|>")},
        "image_token": "<image>",
    },
    "named tokens of the vocabulary": {"eos_token": "o", "unk_token": "e"},
    "additional special tokens": {"additional_special_tokens": ["<extra>", "<more>"]},
    "extra special tokens": {"extra_special_tokens": {"image_token": "<image>"}, "added_tokens_decoder": {}},
    "a model's own named token": {"image_token": "<image>"},
    "null": {"eos_token": None, "pad_token": None},
}


@pytest.mark.parametrize("name", ADDED_CONFIGS)
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_agree_with_transformers(byte_level_dir, tmp_path, name, special):
    """Those that only tokenizer_config.json knows, and those that it knows otherwise than tokenizer.json."""
    transformers = pytest.importorskip("transformers", minversion="5" if "a model's own" in name else None)
    copy_tokenizer_files(byte_level_dir, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ADDED_CONFIGS[name]})
    )
    if not special:
        values = json.loads((tmp_path / "tokenizer.json").read_text())
        values["added_tokens"][2]["special"] = False
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    for text in [*ADDED_TEXTS, *TEXTS]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_older_files_of_added_tokens_agree_with_transformers(byte_level_dir, tmp_path):
    transformers = pytest.importorskip("transformers")
    copy_tokenizer_files(byte_level_dir, tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<plain>": 404, "<tool>": 403}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": _added("<tool>"), "additional_special_tokens": ["<extra>"]})
    )
    copy = tmp_path / "engine"
    copy.mkdir()
    copy_tokenizer_files(tmp_path, copy)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for ours in (load_tokenizer(tmp_path), load_tokenizer(copy)):
        assert ours.eos_token_ids == (theirs.eos_token_id,)
        for text in ADDED_TEXTS:
            assert ours.encode(text) == theirs.encode(text)


def test_special_tokens_are_those_that_decoding_leaves_out(tokenizer):
    assert tokenizer.special_tokens
    for text, token_id in tokenizer.special_tokens.items():
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.decode([token_id], skip_special_tokens=False) == text


def test_control_tokens_of_a_user_in_a_sentencepiece_chat(sentencepiece_dir):
    """No space slips in between the pieces that are encoded on their own."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(sentencepiece_dir)
    if "sanitize_control_tokens" not in inspect.signature(theirs.apply_chat_template).parameters:
        pytest.skip("this version of transformers can't do it")
    ours = load_tokenizer(sentencepiece_dir)
    for words in ("a</s>b", "</s> a", "a </s>", "<s></s>", "hello"):
        messages = [{"role": "user", "content": words}]
        expected = theirs.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False)
        assert ours.apply_chat_template(messages, False, ChatOptions(sanitize_control_tokens=True)) == expected
        assert expected.count(2) == 0


def test_qwen_v1_chats_end_at_both_of_chatml_s_tokens(tiktoken_dir):
    tokenizer = load_tokenizer(tiktoken_dir)
    ends = [tokenizer.encode(token)[0] for token in ("<|endoftext|>", "<|im_end|>", "<|im_start|>")]
    assert list(tokenizer.chat_end_token_ids()) == ends
    message = [{"role": "user", "content": "x"}]
    for options in ({"tools": [{}]}, {"template_kwargs": {"a": 1}}, {"template": "{{ messages }}"}):
        with pytest.raises(QwenModelError, match=r"no place for|takes no chat_template"):
            tokenizer.apply_chat_template(message, True, ChatOptions(**options))


@pytest.fixture(scope="module")
def whitespace_dir(tiktoken_dir, tmp_path_factory):
    """A ``qwen.tiktoken`` with tokens of several spaces, tabs and new lines."""
    folder = tmp_path_factory.mktemp("whitespace")
    lines = (tiktoken_dir / "qwen.tiktoken").read_bytes()
    count = len(lines.splitlines())
    for token in (b"  ", b"    ", b"        ", b"\t\t", b"\n\n", b" \n", b" x"):
        lines += base64.b64encode(token) + b" %d\n" % count
        count += 1
    (folder / "qwen.tiktoken").write_bytes(lines)
    return folder


@pytest.mark.parametrize("mark", [" ", "\t"])
@pytest.mark.parametrize("around", ["{}", "\n{}x", "a <|im_end|>{}\n<|im_end|>"])
def test_a_million_spaces(whitespace_dir, mark, around):
    """tiktoken's regular expressions give up there: the ids must be what it gives for less, with more of the same."""
    tokenizer = load_tokenizer(whitespace_dir)
    started = time.monotonic()
    ids = tokenizer.encode(around.format(mark * 1_000_000))
    assert time.monotonic() - started < 30
    short = tokenizer.encode(around.format(mark * 80_000))
    assert tokenizer.decode(ids, skip_special_tokens=False) == around.format(mark * 1_000_000)
    start, end = next((i for i in range(9) if short[i] == short[i + 8]), 0), 12
    assert ids[: start + 8] == short[: start + 8]
    assert ids[-end:] == short[-end:]
    assert set(ids) == set(short)


@given(text=st.lists(st.sampled_from([*" \t\n\r\x1c\x85\u3000xé1!'s你", "<|im_end|>"]), max_size=60).map("".join))
@settings(deadline=None, max_examples=150)
def test_long_whitespace_is_split_as_tiktoken_splits(whitespace_dir, text):
    tokenizer = load_tokenizer(whitespace_dir)
    for parse in (True, False):
        expected = tokenizer.encode(text, parse_special_tokens=parse)
        assert tokenizer._encode_piece_by_piece(unicodedata.normalize("NFC", text), parse) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer"),
        ("qwen.tiktoken", "aGVsbG8=\n", "line 1"),
        ("qwen.tiktoken", "aGVsbG8= 0\n?? 1\n", "line 2"),
        ("qwen.tiktoken", "aGVsbG8= 0\naGU= 2\n", "without a gap"),
        ("qwen.tiktoken", "", "without a gap"),
        ("qwen.tiktoken", "aGVsbG8= 0\naGU= 1\n", "no token for the byte 0x00"),
        ("qwen.tiktoken", "aGVsbG8= " + "9" * 9999, "line 1"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(QwenModelError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "JSON object"),
        ('{"eos_token": "<gone>"}', "<gone>"),
        ('{"additional_special_tokens": "<x>"}', "special tokens must be a list, not '<x>'"),
        ('{"added_tokens_decoder": {"x": {"content": "<x>"}}}', r"tokenizer_config\.json cannot be added.*'x'"),
        ('{"added_tokens_decoder": {"500": {"lstrip": true}}}', r"tokenizer_config\.json cannot be added.*'content'"),
    ],
)
def test_broken_tokenizer_config(byte_level_dir, tmp_path, content, message):
    copy_tokenizer_files(byte_level_dir, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(QwenModelError, match=message):
        load_tokenizer(tmp_path)


def test_threads_do_not_change_how_others_read_special_tokens():
    """A thread begins to encode between two steps of another."""

    class Slow:
        encode_special_tokens = False

        def no_truncation(self): ...

        def no_padding(self): ...

        def get_added_tokens_decoder(self):
            return {}

        def get_vocab_size(self, with_added_tokens):
            return 2

        def encode(self, text, add_special_tokens):
            time.sleep(0.05)
            return SimpleNamespace(ids=[int(self.encode_special_tokens)])

    tokenizer, found = HuggingFaceTokenizer(Slow(), {}, {}), {}

    def encode(parse):
        found[parse] = tokenizer.encode("x", parse_special_tokens=parse)

    threads = [threading.Thread(target=encode, args=(parse,)) for parse in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {True: [0], False: [1]}


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(QwenModelError, match="character 1"):
        tokenizer.encode("a\ud83d")


@pytest.mark.parametrize(("source", "name"), [("byte_level_dir", "tokenizer.json"), ("tiktoken_dir", "qwen.tiktoken")])
def test_pointers_of_git_lfs_and_byte_order_marks(source, name, request, tmp_path):
    content = (request.getfixturevalue(source) / name).read_bytes()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert load_tokenizer(tmp_path).encode("hello world")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7031645\n")
    with pytest.raises(QwenModelError, match=f"{name} is a pointer of Git LFS"):
        load_tokenizer(tmp_path)
