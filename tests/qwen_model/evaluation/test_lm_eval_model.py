"""lm-eval on an engine: the numbers and texts are those of lm-eval's own class for transformers."""

import json
import logging
import sys

import pytest

from qwen_model.common.errors import QwenModelError
from qwen_model.interface.sampling import SamplingOptions
from qwen_model.packaged_model import held_out_text, packaged_model_dir

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402 (only where lm-eval is installed)

LENGTH = 64  # of the engine's prompts


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    from qwen_model import build_engine

    folder = tmp_path_factory.mktemp("lm_eval") / "engine"
    build_engine(output_dir=folder, dtype="float32", max_batch_size=4, max_input_len=LENGTH, max_output_len=32)
    return folder


@pytest.fixture(scope="module")
def ours(engine_dir):
    from qwen_model.evaluation.lm_eval_model import QwenModelLM

    return QwenModelLM(str(engine_dir), device="cpu")


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(packaged_model_dir()), dtype="float32", device="cpu", max_length=LENGTH, batch_size=3)


def instances(kind, *arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def lines(count):
    return [line for line in held_out_text().splitlines() if len(line) > 20][:count]


def test_log_likelihoods(ours, theirs):
    """Shared contexts, no context, a context that ends in a space, and more tokens than fit."""
    texts = lines(8)
    pairs = [(context, continuation) for context in texts[:3] for continuation in (" x", " = 1", texts[4])]
    pairs += [("", texts[5]), ("import ", "os"), ("\n".join(lines(60)), " return"), ("a", "\n".join(texts[:3]))]
    found = ours.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-5, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_recognized(ours):
    context = "def __init__(self"
    (text,) = ours.generate_until(instances("generate_until", (context, {"until": [], "max_gen_toks": 1})), True)
    answers = ours.loglikelihood(instances("loglikelihood", (context, text), (context, "zebra")), True)
    assert [greedy for _, greedy in answers] == [True, False]


def test_rolling_windows(ours, theirs):
    texts = [(held_out_text()[:3000],), ("x",), ("\n".join(lines(9)),)]
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


def test_generation(ours, theirs):
    """Contexts of many lengths, in more than one batch and with different settings in one list."""
    until_line, few = {"until": ["\n"], "max_gen_toks": 20}, {"until": ["zz"], "max_gen_toks": 7, "do_sample": False}
    requests = [(line, settings) for line in lines(6) for settings in (until_line, few)]
    found = ours.generate_until(instances("generate_until", *requests), disable_tqdm=True)
    expected = theirs.generate_until(instances("generate_until", *requests), disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > 3


def test_sampling_is_seeded(ours):
    settings = {"do_sample": True, "temperature": 1.5, "until": [], "max_gen_toks": 12}
    requests = instances("generate_until", ("def f(x):", settings), ("class A", settings))
    first, second = (ours.generate_until(requests, True) for _ in range(2))
    greedy = ours.generate_until(instances("generate_until", ("def f(x):", {"until": [], "max_gen_toks": 12})), True)
    assert first == second
    assert first[0] != greedy[0]


def test_penalties_apply_to_greedy_choice(ours):
    session = ours._session
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        settings = {"until": [], "max_gen_toks": 24, penalty: 2.0, "min_p": 0.5}
        [found] = ours.generate_until(instances("generate_until", ("x = 1\nx = 1\n", settings)), True)
        options = SamplingOptions(**{penalty: 2.0})
        [output] = session.generate("x = 1\nx = 1\n", max_new_tokens=24, sampling=options).outputs
        assert found == output.text


def test_what_is_cut_is_said(ours, caplog):
    with caplog.at_level(logging.WARNING):
        ours.loglikelihood(instances("loglikelihood", ("x = 1\n" * 100, "y")), disable_tqdm=True)
    assert f"is cut on the left to {LENGTH}" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"until": [], "max_gen_toks": 33}, "max_new_tokens 33 is more than the engine's limit of 32"),
        ({"until": [], "num_beams": 4}, "no argument num_beams"),
    ],
)
def test_generation_that_an_engine_does_not_do(ours, settings, message):
    with pytest.raises(QwenModelError, match=message):
        ours.generate_until(instances("generate_until", ("x", settings)), disable_tqdm=True)


def test_a_continuation_beyond_the_limit(ours):
    with pytest.raises(QwenModelError, match=f"must have 1 to {LENGTH}"):
        ours.loglikelihood(instances("loglikelihood", ("a", "x = 1\n" * 100)), disable_tqdm=True)


@pytest.mark.parametrize("answer", [None, "Because"])
def test_chats(ours, theirs, answer):
    history = [{"role": "user", "content": "Why?"}]
    history += [] if answer is None else [{"role": "assistant", "content": answer}]
    found = ours.apply_chat_template(history, add_generation_prompt=answer is None)
    assert found == theirs.apply_chat_template(history, add_generation_prompt=answer is None)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"max_length": "many"}])
def test_wrong_arguments(engine_dir, arguments):
    from qwen_model.evaluation.lm_eval_model import QwenModelLM

    with pytest.raises(QwenModelError, match="must be a positive integer"):
        QwenModelLM(str(engine_dir), device="cpu", **arguments)


def test_the_command(engine_dir, tmp_path, monkeypatch, capsys):
    """The tasks of this package, whose data are in it: no hub is needed."""
    from qwen_model.lm_eval import main

    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    main(["--engine-dir", str(engine_dir), "--device", "cpu", "--tasks", "packaged_python", "--limit", "2"])
    printed = capsys.readouterr().out
    for task in ("packaged_python_choice", "packaged_python_word", "packaged_python_text"):
        assert f"|{task}" in printed


def test_a_task_that_does_not_exist(engine_dir, monkeypatch):
    from qwen_model.lm_eval import main

    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(QwenModelError, match=r"lm-eval: .*nonsense"):
        main(["--engine-dir", str(engine_dir), "--tasks", "nonsense"])


def test_the_name_of_an_engine_may_have_commas():
    from qwen_model.lm_eval import _arguments

    arguments = _arguments("a,b=c", [])
    assert json.loads(arguments[arguments.index("--model_args") + 1]) == {"engine_dir": "a,b=c"}
