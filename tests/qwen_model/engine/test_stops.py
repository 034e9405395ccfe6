"""Where generation ends: end tokens, stop strings, stop tokens and the end of a turn, on a model that says a script."""

import json

import pytest

import qwen_model
from qwen_model import QwenModelError
from tests.qwen_model.conftest import save_byte_tokenizer
from tests.qwen_model.model_files import save_scripted_model

END, START, IM_END, CALL = 256, 257, 258, 259
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


def engine(folder, before, *parts, **config):
    """A session of a model that says these parts, texts and tokens, after `before`; it ends at <|endoftext|>."""
    save_byte_tokenizer(folder, {"eos_token": "<|endoftext|>", **config}, SPECIAL, ["<tool_call>"])
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    script = []
    for part in (before, *parts):
        script += tokenizer.encode(part).ids if isinstance(part, str) else [part]
    save_scripted_model(folder, script)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    qwen_model.build_engine(folder, output_dir=folder / "engine", dtype="float32")
    return qwen_model.load_engine(folder / "engine", device="cpu")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return engine(tmp_path_factory.mktemp("model"), "Q", "helo", IM_END, " ab", CALL, "c", END)


@pytest.mark.parametrize(
    ("options", "text", "count"),
    [
        ({}, "helo ab<tool_call>c", 11),
        ({"stop": "<|im_end|>"}, "helo", 5),
        ({"stop": ["z", "<|im_end|>"]}, "helo", 5),
        ({"stop": ["b", "<|im_end|>"]}, "helo", 5),
        ({"stop": ["l", "<|im_end|>"]}, "he", 3),
        ({"stop": "<|endoftext|>"}, "helo ab<tool_call>c", 11),
        ({"stop": "o a"}, "hel", 7),
        ({"stop": "<tool_call>"}, "helo ab", 9),
        ({"stop": "b<tool_call>"}, "helo a", 9),
        ({"stop_token_ids": [IM_END]}, "helo", 5),
        ({"stop_token_ids": (CALL,)}, "helo ab", 9),
        ({"stop_token_ids": []}, "helo ab<tool_call>c", 11),
        ({"stop": "a", "stop_token_ids": [CALL]}, "helo ", 7),
    ],
    ids=str,
)
def test_stops(session, options, text, count):
    output = session.generate("Q", max_new_tokens=20, **options).outputs[0]
    assert (output.text, output.finish_reason, len(output.output_ids)) == (text, "stop", count)
    events = list(session.stream("Q", max_new_tokens=20, **options))
    assert ("".join(event.text for event in events), events[-1].finish_reason, len(events)) == (text, "stop", count)


@pytest.mark.parametrize("options", [{"stop": "<|im_end|>"}, {"stop_token_ids": [IM_END]}])
def test_beams_end_at_tokens_too(session, options):
    output = session.generate("Q", max_new_tokens=20, num_beams=2, **options).outputs[0]
    assert (output.text, output.finish_reason) == ("helo", "stop")
    with pytest.raises(QwenModelError, match="no stop strings"):
        session.generate("Q", num_beams=2, stop="l")


@pytest.mark.parametrize("stop", ["o<|im_end|>", "<|im_end|>\n", ["l", "<|im_start|>user"], "<|im_end|><|im_end|>"])
def test_stops_that_would_never_be_found(session, stop):
    with pytest.raises(QwenModelError, match=r"would never be found: <\|im_(end|start)\|> is a special token.*alone"):
        session.generate("Q", stop=stop)
    with pytest.raises(QwenModelError, match="would never be found"):
        session.stream("Q", stop=stop)
    with pytest.raises(QwenModelError, match="would never be found: it holds half of a surrogate pair"):
        session.generate("Q", stop=["l", "a\ud83d"])


@pytest.mark.parametrize("wrong", [[-1], [300], [1.0], ["a"], "12", 3, [True], [[1]]])
def test_stop_tokens_that_are_none(session, wrong):
    with pytest.raises(QwenModelError, match="stop_token_ids must be a list of token ids from 0 to 299"):
        session.generate("Q", stop_token_ids=wrong)


@pytest.mark.parametrize("template", [CHATML, None], ids=["ChatML in the checkpoint", "our own ChatML"])
def test_a_chat_ends_with_the_turn_where_the_end_token_is_another(tmp_path, template):
    config = {} if template is None else {"chat_template": template}
    session = engine(tmp_path, "\n", "helo", IM_END, " USR", END, **config)
    output = session.generate("x", chat=True, max_new_tokens=20).outputs[0]
    assert (output.text, output.output_ids[-1], output.finish_reason) == ("helo", IM_END, "stop")
    beams = session.generate("x", chat=True, max_new_tokens=20, num_beams=2).outputs[0]
    assert (beams.text, beams.output_ids[-1]) == ("helo", IM_END)
    assert session.generate("\n", max_new_tokens=20).outputs[0].text == "helo USR"  # no chat


def test_the_template_that_is_chosen_says_where_a_chat_ends(tmp_path):
    templates = [
        {"name": "default", "template": CHATML},
        {"name": "calls", "template": "{% for m in messages %}\n{{ m.content }}<tool_call>\n{% endfor %}\n"},
    ]
    session = engine(tmp_path, "\n", "he", CALL, "lo", IM_END, END, chat_template=templates)
    assert session.generate("x", chat=True, max_new_tokens=9).outputs[0].text == "he<tool_call>lo"
    assert session.generate("x", chat=True, max_new_tokens=9, chat_template="calls").outputs[0].text == "he"


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("wrong", ["-1", "300", "[258, 300]", "1" + "0" * 30, "3.0", "true", "[1, false]", '"2"', "{}"])
def test_end_tokens_that_are_none(tmp_path, name, wrong):
    save_byte_tokenizer(tmp_path, None, SPECIAL)
    save_scripted_model(tmp_path, [1, 2])
    values = json.loads((tmp_path / name).read_text()) if name == "config.json" else {}
    (tmp_path / name).write_text(json.dumps({**values, "eos_token_id": json.loads(wrong)}))
    with pytest.raises(QwenModelError, match=rf"/{name}: eos_token_id must be one or several token ids from 0 to 299"):
        qwen_model.build_engine(tmp_path, output_dir=tmp_path / "engine")


@pytest.mark.parametrize(
    ("generation", "config", "ends"), [(None, 7, (7,)), ([], [7, 8], (7, 8)), (9, 7, (9,)), ([9, 9], -1, (9,))]
)
def test_end_tokens_of_the_configuration_where_there_are_no_others(tmp_path, generation, config, ends):
    save_scripted_model(tmp_path, [1, 2])
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert qwen_model.build_engine(tmp_path, output_dir=tmp_path / "engine").config.end_token_ids == ends
