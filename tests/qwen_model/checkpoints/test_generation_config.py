"""How a checkpoint's authors choose tokens: read into the engine, and what a user changes of it."""

import json
import shutil

import pytest

import qwen_model
from qwen_model import QwenModelError, SamplingOptions, run
from qwen_model.interface.sampling import SamplingDefaults
from tests.qwen_model.model_files import hugging_face_model

QWEN_2_5 = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def build(model_dir, folder, config):
    shutil.copytree(model_dir, folder / "model", dirs_exist_ok=True)
    (folder / "model" / "generation_config.json").write_text(json.dumps(config))
    return qwen_model.build_engine(
        folder / "model", output_dir=folder / "engine", dtype="float32", max_input_len=100, max_output_len=40
    )


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (QWEN_2_5, {}, SamplingOptions(0.7, 20, 0.8, 1.05)),
        (QWEN_2_5, {"temperature": 0}, SamplingOptions(0, 20, 0.8, 1.05)),
        (QWEN_2_5, {"temperature": 0.3, "seed": 4}, SamplingOptions(0.3, 20, 0.8, 1.05, 4)),
        (QWEN_2_5, {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}, SamplingOptions(0.7)),
        ({**QWEN_2_5, "do_sample": False}, {}, SamplingOptions(repetition_penalty=1.05)),
        ({**QWEN_2_5, "do_sample": False}, {"temperature": 1}, SamplingOptions(1, 20, 0.8, 1.05)),
        ({**QWEN_2_5, "do_sample": False}, {"top_p": 0.5}, SamplingOptions(0.7, 20, 0.5, 1.05)),
        ({"do_sample": True}, {}, SamplingOptions(1.0)),
        ({"do_sample": True, "top_k": -1, "temperature": None}, {}, SamplingOptions(1.0)),
        ({"repetition_penalty": 1.2}, {"seed": 1}, SamplingOptions(repetition_penalty=1.2, seed=1)),
        ({"temperature": 0.6, "top_p": 0.9}, {}, SamplingOptions()),
        ({}, {}, SamplingOptions()),
        ({}, {"top_k": 5}, SamplingOptions(1.0, 5)),
        ({}, {"min_p": 0.1}, SamplingOptions(1.0, min_p=0.1)),
        ({**QWEN_2_5, "min_p": 0.2}, {}, SamplingOptions(0.7, 20, 0.8, 1.05, min_p=0.2)),
        ({**QWEN_2_5, "min_p": 0.2}, {"min_p": 0.0}, SamplingOptions(0.7, 20, 0.8, 1.05)),
        ({}, {"presence_penalty": 1, "logit_bias": {3: 2}}, SamplingOptions(presence_penalty=1, logit_bias={3: 2})),
        (QWEN_2_5, {"frequency_penalty": -1}, SamplingOptions(0.7, 20, 0.8, 1.05, frequency_penalty=-1)),
    ],
)
def test_what_is_given_wins_and_the_rest_is_the_checkpoint_s(model_dir, tmp_path, config, given, expected):
    built = build(model_dir, tmp_path, config).config
    assert built.sampling_defaults.options(**given) == expected
    assert qwen_model.load_engine(tmp_path / "engine", device="cpu").config == built


def test_a_session_takes_the_defaults_unless_it_is_given_options(model_dir, tmp_path, session):
    build(model_dir, tmp_path, {"repetition_penalty": 1.7, "eos_token_id": [290, 301]})
    loaded = qwen_model.load_engine(tmp_path / "engine", device="cpu")
    greedy = session.generate([1, 2, 3]).outputs
    penalised = session.generate([1, 2, 3], sampling=SamplingOptions(repetition_penalty=1.7)).outputs
    assert loaded.generate([1, 2, 3]).outputs == penalised != greedy
    assert [event.token_id for event in loaded.stream([1, 2, 3])] == penalised[0].output_ids
    assert loaded.generate([1, 2, 3], sampling=SamplingOptions()).outputs == greedy
    assert loaded.generate([1, 2, 3], num_beams=2).outputs == session.generate([1, 2, 3], num_beams=2).outputs


def test_the_greedy_tokens_are_those_of_transformers_with_the_same_file(model_dir, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = {"repetition_penalty": 1.3, "do_sample": False}
    build(model_dir, tmp_path, config)
    prompt = [5, 6, 7, 5, 6, 7]
    model = hugging_face_model("Qwen2ForCausalLM", seed=3)
    model.generation_config = transformers.GenerationConfig(**config)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20)[0, len(prompt) :].tolist()
    ours = qwen_model.load_engine(tmp_path / "engine", device="cpu")
    assert ours.generate(prompt, max_new_tokens=20).outputs[0].output_ids == expected


def test_run_with_and_without_the_defaults(model_dir, tmp_path, session, capsys):
    build(model_dir, tmp_path, {**QWEN_2_5, "repetition_penalty": 1.7, "eos_token_id": [290, 301]})

    def ran(*options):
        run.main(["--engine-dir", str(tmp_path / "engine"), "--device", "cpu", "--json", "Hi", *options])
        return json.loads(capsys.readouterr().out)["outputs"][0]["output_ids"]

    def expected(**options):
        return session.generate("Hi", sampling=SamplingOptions(**options)).outputs[0].output_ids

    assert ran("--seed", "3") == expected(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.7, seed=3)
    assert ran("--temperature", "0") == expected(repetition_penalty=1.7)
    assert ran("--temperature", "0", "--repetition-penalty", "1") == expected()
    assert ran("--generation-config", "none") == expected()
    assert ran("--generation-config", "none", "--top-k", "5", "--seed", "1") == expected(top_k=5, seed=1)
    assert ran("--generation-config", "none", "--min-p", "0.9", "--seed", "1") == expected(min_p=0.9, seed=1)
    penalties = ("--presence-penalty", "-1.5", "--frequency-penalty", "2")
    assert ran("--generation-config", "none", *penalties) == expected(presence_penalty=-1.5, frequency_penalty=2)
    beams = session.generate("Hi", num_beams=2).outputs[0].output_ids
    assert ran("--num-beams", "2") == ran("--num-beams", "2", "--temperature", "0") == beams


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": -1}, "temperature must be a number of at least 0, not -1"),
        ({"temperature": "warm"}, "temperature must be a number, not 'warm'"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"top_k": 2.5}, "top_k must be an integer, not 2.5"),
        ({"top_k": -2}, "top_k must be at least 0"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": [0.8]}, "top_p must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 1e-12"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
    ],
)
def test_defaults_that_are_wrong(model_dir, tmp_path, config, message):
    with pytest.raises(QwenModelError, match=f"generation_config.json.*{message}|is not JSON: a number has"):
        build(model_dir, tmp_path, config)


def test_what_is_left_out_is_said(model_dir, tmp_path):
    neutral = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "bad_words_ids": []}
    neutral |= {"min_new_tokens": 0, "min_length": 0, "guidance_scale": 1.0, "stop_strings": None}
    assert not build(model_dir, tmp_path, neutral).warnings
    given = {**neutral, "typical_p": 0.5, "suppress_tokens": [1], "stop_strings": "\n"}
    (warning,) = build(model_dir, tmp_path, given).warnings
    assert warning.startswith("ignored settings of generation_config.json")
    assert warning.endswith("stop_strings, suppress_tokens, typical_p")


@pytest.mark.parametrize("value", [3, {"top_p": 2}, {"warmth": 1}, {"temperature": None}])
def test_engines_whose_defaults_are_damaged(engine_dir, tmp_path, value):
    values = json.loads((engine_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "sampling_defaults": value}))
    with pytest.raises(QwenModelError, match=r"config\.json is damaged"):
        qwen_model.load_engine(tmp_path)


def test_defaults_without_a_file_change_nothing():
    assert SamplingDefaults().options() == SamplingOptions()
