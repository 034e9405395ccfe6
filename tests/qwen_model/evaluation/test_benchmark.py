"""The command `qwen-model benchmark`, as a user runs it."""

import json

import pytest

from qwen_model import benchmark, load_engine
from qwen_model.common.errors import OutOfMemoryError
from qwen_model.evaluation import original
from qwen_model.evaluation.targets import EngineTarget
from tests.qwen_model.evaluation import fake_server


def run(capsys, *arguments):
    """Return exit status, standard output and standard error."""
    from qwen_model.command_line import run_command

    with pytest.raises(SystemExit) as exit_:
        run_command(benchmark.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_an_engine_beside_transformers(capsys, engine_dir, model_dir, tmp_path):
    output = tmp_path / "rows.json"
    arguments = ("--random", "5,4", "--num-prompts", 3, "--batch-sizes", 1, 2, 9, "--output", output)
    status, out, err = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", "--hf", model_dir, *arguments)
    assert (status, err) == (0, "")
    values = json.loads(output.read_text())
    rows = {(row["implementation"].split()[0], row["concurrency"]): row for row in values["rows"]}
    assert set(rows) == {(name, size) for name in ("torch", "transformers") for size in (1, 2, 9)}
    for name in ("torch", "transformers"):
        for size in (1, 2):
            row = rows[name, size]
            assert row["requests"] == 3
            generated = row["rates"]["generated_tokens"] * row["rates"]["seconds"]
            assert generated == pytest.approx(3 * 4)
            assert row["rates"]["total_tokens"] == pytest.approx(row["rates"]["generated_tokens"] * 9 / 4)
            assert row["first_token_ms"]["count"] == row["per_token_ms"]["count"] == 3
            assert row["between_tokens_ms"]["count"] == 9
        assert "only 3 prompts" in rows[name, 9]["note"]
    assert "3 random prompts of 5 tokens, 4 new tokens each, seed 0" in out
    assert out.count("\n| ") == 7


def test_default_batches_reach_the_engines_limit(capsys, engine_dir):
    status, out, _ = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", "--random", "2,2")
    assert status == 0
    assert [line.split("|")[2].strip() for line in out.splitlines()[4:]] == ["1", "2", "4", "6"]


def test_a_prompt_is_computed_anew_in_each_batch(engine_dir, monkeypatch):
    session = load_engine(engine_dir, device="cpu")
    target, forward, tokens = EngineTarget(session), session.device.forward, []
    monkeypatch.setattr(session.device, "forward", lambda batch: (tokens.append(len(batch.tokens)), forward(batch)))
    assert session.device.page_size < 100
    for _ in range(2):
        target.generate([list(range(100))], 1, lambda: None)
    assert tokens == [100, 100]


def test_a_conversation_file(capsys, engine_dir, tmp_path):
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three"}]
    (tmp_path / "share.json").write_text(json.dumps([{"conversations": turns}, {}]))
    arguments = ("--dataset", tmp_path / "share.json", "--num-prompts", 5, "--batch-sizes", 1)
    status, out, err = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", *arguments)
    assert status == 0
    assert "1 prompts of share.json" in out
    assert "1 usable conversations, not 5" in err
    assert "1 entries" in err


def test_transformers_without_memory_is_a_row(capsys, engine_dir, model_dir, monkeypatch):
    def refuse(self, *arguments):
        raise OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(original.Original, "__init__", refuse)
    options = ("--random", "2,2", "--batch-sizes", 1)
    status, out, _ = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", "--hf", model_dir, *options)
    assert status == 0
    assert "out of memory: Tried to allocate 9 GiB" in out


def test_without_matplotlib_only_the_plot_is_left_out(capsys, engine_dir, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    options = ("--random", "2,2", "--batch-sizes", 1, "--plot", tmp_path / "plot.svg")
    status, out, err = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", *options)
    assert status == 0
    assert "torch engine" in out
    assert err.startswith("note: no plot: a plot needs matplotlib")
    assert not (tmp_path / "plot.svg").exists()


def test_a_server(capsys, engine_dir):
    with fake_server.running() as server:
        common = ("--engine-dir", engine_dir, "--url", server.url, "--random", "5,3", "--num-prompts", 4)
        status, out, _ = run(capsys, *common, "--batch-sizes", 1, 4)
        assert status == 0
        assert [line.split("|")[2].strip() for line in out.splitlines()[4:]] == ["1", "4"]
        prompts = [body["prompt"] for _, body in server.bodies]
        assert len(set(prompts)) == len(prompts) == 1 + 2 * 4  # a prefix cache has none of them
        status, out, _ = run(capsys, *common, "--request-rate", 200, "--max-concurrency", 2, "--endpoint", "chat")
        assert (status, len(out.splitlines())) == (0, 5)


def test_a_server_whose_every_answer_fails(capsys, engine_dir):
    with fake_server.running("error") as server:
        options = ("--url", server.url, "--random", "5,3", "--num-prompts", 2, "--batch-sizes", 2)
        status, out, err = run(capsys, "--engine-dir", engine_dir, *options)
    assert (status, err) == (1, "")
    assert "2 of 2 requests failed: HTTP 500: the engine is on fire" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--random", "121,1"), "--random 121,1 is beyond the engine's limits, prompts of 120"),
        (("--random", "1,41"), "outputs of 40"),
        (("--output", "nowhere/rows.json"), "there is no folder nowhere"),
        (("--output", "."), "it is a folder"),
        (("--plot", "nowhere/plot.svg"), "there is no folder nowhere"),
        (("--hf", "no/such/folder/here"), "transformers cannot load no/such/folder/here"),
    ],
)
def test_errors_before_anything_is_measured(capsys, engine_dir, options, message):
    status, out, err = run(capsys, "--engine-dir", engine_dir, "--device", "cpu", *options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--random", "5"),
        ("--random", "5,0"),
        ("--random", "5,5", "--dataset", "share.json"),
        ("--num-prompts", "0"),
        ("--seed", "-1"),
        ("--request-rate", "2"),
        ("--url", "http://localhost", "--request-rate", "1e-300"),
        ("--url", "http://localhost", "--timeout", "1e300"),
        ("--url", "http://localhost", "--request-rate", "2", "--batch-sizes", "1", "2"),
        ("--model", "name"),
        ("--tokenizer", "engine"),
        ("--endpoint", "completions"),
        ("--timeout", "600"),
        ("--no-ignore-eos",),
        ("--url", "http://localhost", "--device", "cpu"),
        ("--url", "http://localhost", "--no-tuning"),
        ("--url", "http://localhost", "--gpu-memory-utilization", "0.9"),
        ("--url", "http://localhost", "--deterministic"),
        ("--url", "http://localhost", "--hf", "model"),
        ("--plot", "plot.txt"),
    ],
)
def test_command_lines_that_are_refused(capsys, options):
    assert run(capsys, *options)[0] == 2
