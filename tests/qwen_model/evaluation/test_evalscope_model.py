"""EvalScope on an engine: its model API answers as a session does, and the command runs a data set from a file."""

import json
import logging

import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.interface.sampling import SamplingOptions

pytest.importorskip("evalscope")
from evalscope.api.messages import ChatMessageSystem, ChatMessageUser
from evalscope.api.model import GenerateConfig


@pytest.fixture(scope="module")
def api(engine_dir):
    from qwen_model.evaluation.evalscope_model import QwenModelAPI

    return QwenModelAPI(str(engine_dir), device="cpu")


@pytest.fixture
def restored_logging():
    """EvalScope sets up the root logger, also with files of its run."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def test_an_answer_is_the_sessions(api, session):
    messages = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Why?")]
    answer = api.generate(messages, [], "none", GenerateConfig(max_tokens=9, temperature=0.0))
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    result = session.generate(plain, chat=True, max_new_tokens=9)
    assert answer.completion == result.outputs[0].text
    assert answer.usage.output_tokens == result.timing.generated_tokens
    assert answer.usage.input_tokens == result.timing.prompt_tokens
    assert answer.stop_reason == {"stop": "stop", "length": "max_tokens"}[result.outputs[0].finish_reason]


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.5, "seed": 4}, {}),
        (
            {"do_sample": False, "presence_penalty": 1.5, "logit_bias": {9: 8.0}},
            {"presence_penalty": 1.5, "logit_bias": {9: 8.0}},
        ),
        ({"do_sample": True, "seed": 4}, {"temperature": 1.0, "seed": 4}),
        ({"temperature": 0.9, "top_k": 5, "seed": 4}, {"temperature": 0.9, "top_k": 5, "seed": 4}),
    ],
)
def test_answers_are_greedy_unless_sampling_is_asked_for(api, session, config, sampling):
    answer = api.generate([ChatMessageUser(content="Why?")], [], "none", GenerateConfig(max_tokens=9, **config))
    options = SamplingOptions(**sampling)
    result = session.generate([{"role": "user", "content": "Why?"}], chat=True, max_new_tokens=9, sampling=options)
    assert answer.completion == result.outputs[0].text


def test_tools_are_refused(api):
    with pytest.raises(QwenModelError, match="tools are not supported"):
        api.generate([ChatMessageUser(content="Why?")], [object()], "auto", GenerateConfig())


def test_the_command(engine_dir, tmp_path, restored_logging):
    from qwen_model.evalscope import main

    (tmp_path / "tiny.jsonl").write_text(json.dumps({"query": "Why?", "response": "Because."}) + "\n")
    data = {"general_qa": {"local_path": str(tmp_path), "subset_list": ["tiny"]}}
    options = ["--engine-dir", str(engine_dir), "--device", "cpu", "--datasets", "general_qa"]
    options += ["--dataset-args", json.dumps(data), "--work-dir", str(tmp_path / "out"), "--no-timestamp"]
    main([*options, "--generation-config", '{"max_tokens": 4}'])
    report = json.loads((tmp_path / "out" / "reports" / engine_dir.name / "general_qa.json").read_text())
    assert report["dataset_name"] == "general_qa"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--datasets", "nonsense"], "EvalScope: .*nonsense"), (["--engine-dir", "nowhere"], "nowhere is not an engine")],
)
def test_wrong_use(engine_dir, tmp_path, restored_logging, options, message):
    from qwen_model.evalscope import main

    with pytest.raises(QwenModelError, match=message):
        main(["--engine-dir", str(engine_dir), "--work-dir", str(tmp_path), *options])


def test_a_data_set_is_required(engine_dir, capsys):
    from qwen_model.evalscope import main

    with pytest.raises(SystemExit) as exit_:
        main(["--engine-dir", str(engine_dir)])
    assert exit_.value.code == 2
    assert "required: --datasets" in capsys.readouterr().err
