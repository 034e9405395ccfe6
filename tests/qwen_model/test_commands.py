"""The commands as a user runs them: what is on standard output, what on standard error, and the exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_model
from qwen_model import build, chat, inspect, run
from qwen_model.__main__ import COMMANDS, main
from qwen_model.checkpoint_options import parse_rotary_scaling
from qwen_model.command_line import check_output_file, parse_token_ids, run_command
from qwen_model.common.errors import QwenModelError
from qwen_model.packaged_model import packaged_model_dir
from tests.qwen_model.model_files import random_prompt


def python(*arguments, **options):
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # those of a source tree too
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)


@pytest.fixture
def command(capsys):
    """Run a command's main in this process; return its exit status, standard output and standard error."""

    def call(main, *arguments):
        with pytest.raises(SystemExit) as exit_:
            run_command(main, [str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return call


def test_build_and_run_in_processes_of_their_own(model_dir, tmp_path):
    built = python("-m", "qwen_model.build", "--model-dir", model_dir, "--output-dir", tmp_path / "engine")
    assert built.returncode == 0, built.stderr
    for part in ("Qwen2ForCausalLM", "million parameters", "256 sequences", "MiB of weights", "time"):
        assert part in built.stdout
    ran = python(
        "-m", "qwen_model.run", "--engine-dir", tmp_path / "engine", "--device", "cpu", "--json", "Hi", "there"
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert set(result) == {"outputs", "timing"}
    assert [set(output) for output in result["outputs"]] == [{"output_ids", "text", "finish_reason"}] * 2


def test_the_main_job_without_a_checkpoint(tmp_path):
    """The README's commands: the packaged model continues a function with the tokens that transformers chooses."""
    transformers = pytest.importorskip("transformers")
    prompt = "def add(a, b):\n    return"
    assert python("-m", "qwen_model", "build", "--dtype", "float32", cwd=tmp_path).returncode == 0
    ran = python("-m", "qwen_model", "run", prompt, "--max-new-tokens", "8", "--device", "cpu", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(packaged_model_dir())
    model = transformers.AutoModelForCausalLM.from_pretrained(packaged_model_dir(), dtype="float32")
    inputs = tokenizer(prompt, return_tensors="pt")
    chosen = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert ran.stdout == tokenizer.decode(chosen, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("module", ["qwen_model", "qwen_model.run", "qwen_model.build", "qwen_model.chat"])
def test_nothing_heavy_is_imported_before_it_is_needed(module):
    program = (
        f"import sys, {module}; print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert python("-c", program).stdout.strip() == "[]"


def test_a_full_disk_under_standard_output():
    program = (
        "import os, qwen_model.command_line as c\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"
        "c.run_command(lambda arguments: print('much'))"
    )
    result = python("-c", program)
    assert (result.returncode, result.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_memory_that_does_not_suffice():
    program = "import qwen_model.command_line as c\nc.run_command(lambda arguments: bytearray(1 << 62))"
    result = python("-c", program)
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is not enough memory on the host")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(QwenModelError, match="permission denied"):
        check_output_file(tmp_path / "rows.json")


def test_an_output_that_is_no_regular_file():
    check_output_file(Path("/dev/null"))


def test_run_imports_no_transformers(engine_dir):
    program = (
        "import sys\n"
        "from qwen_model.run import main\n"
        "main(sys.argv[1:])\n"
        "print('transformers' in sys.modules, file=sys.stderr)\n"
    )
    result = python("-c", program, "--engine-dir", engine_dir, "--device", "cpu", "--chat", "Hi")
    assert result.stderr.strip().endswith("False")


def test_run_prints_what_the_library_generates(command, engine_dir, session):
    ids = ",".join(map(str, random_prompt(5)))
    status, out, err = command(
        run.main,
        "--engine-dir",
        engine_dir,
        "--device",
        "cpu",
        "--json",
        "--max-new-tokens",
        9,
        "Hi",
        "--input-ids",
        ids,
    )
    expected = session.generate(["Hi", random_prompt(5)], max_new_tokens=9).outputs
    outputs = json.loads(out)["outputs"]
    assert (status, err) == (0, "")
    assert [output["output_ids"] for output in outputs] == [output.output_ids for output in expected]
    assert [output["text"] for output in outputs] == [output.text for output in expected]
    assert [output["finish_reason"] for output in outputs] == [output.finish_reason for output in expected]


def test_every_option_reaches_the_session(command, engine_dir, session):
    sampling = qwen_model.SamplingOptions(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=3)
    options = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "3"]
    common = ["--engine-dir", engine_dir, "--device", "cpu", "Hi"]
    expected = session.generate("Hi", sampling=sampling, max_new_tokens=30).outputs[0].text
    assert command(run.main, *common, *options, "--max-new-tokens", 30) == (0, expected + "\n", "")
    assert command(run.main, *common, *options, "--max-new-tokens", 30, "--stream") == (0, expected + "\n", "")
    stop = expected[4:6]
    cut = session.generate("Hi", sampling=sampling, max_new_tokens=30, stop=stop).outputs[0].text
    assert command(run.main, *common, *options, "--max-new-tokens", 30, "--stop", stop) == (0, cut + "\n", "")
    beams = session.generate("Hi", num_beams=3, max_new_tokens=30).outputs[0].text
    assert command(run.main, *common, "--num-beams", 3, "--max-new-tokens", 30) == (0, beams + "\n", "")


def test_several_outputs_of_a_prompt(command, engine_dir, session):
    options = ("--temperature", "0.9", "--seed", "3", "--n", 2, "--max-new-tokens", 6, "a", "b")
    sampling = qwen_model.SamplingOptions(temperature=0.9, seed=3)
    outputs = session.generate(["a", "b"], n=2, sampling=sampling, max_new_tokens=6, logprobs=2).outputs
    texts = [f"==> {prompt} <==\n{output.text}" for prompt, output in zip("aabb", outputs, strict=True)]
    common = ("--engine-dir", engine_dir, "--device", "cpu", *options)
    assert command(run.main, *common) == (0, "\n\n".join(texts) + "\n", "")
    assert command(run.main, *common, "--stream") == (0, "\n\n".join(texts) + "\n", "")
    status, out, err = command(run.main, *common, "--json", "--logprobs", 2)
    assert (status, err) == (0, "")
    for found, output in zip(json.loads(out)["outputs"], outputs, strict=True):
        assert found["output_ids"] == output.output_ids
        assert [each["logprob"] for each in found["logprobs"]] == pytest.approx(
            [each.logprob for each in output.logprobs], rel=1e-4
        )
        assert [len(each["best"]) for each in found["logprobs"]] == [2] * len(output.output_ids)


def test_input_file(command, engine_dir, session, tmp_path):
    (tmp_path / "prompts.txt").write_text("first\n\nzweite Zeile\u2028mit\fü\n", encoding="utf-8")
    _, out, _ = command(
        run.main, "--engine-dir", engine_dir, "--device", "cpu", "--json", "--input-file", tmp_path / "prompts.txt"
    )
    expected = session.generate(["first", "zweite Zeile\u2028mit\fü"]).outputs
    assert [output["text"] for output in json.loads(out)["outputs"]] == [output.text for output in expected]


def test_input_file_without_prompts(command, engine_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n", encoding="utf-8")
    status, out, err = command(run.main, "--engine-dir", engine_dir, "--input-file", tmp_path / "prompts.txt")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'prompts.txt'} has no prompts")


def test_chat_keeps_the_conversation(command, engine_dir, session, monkeypatch):
    lines = iter(["one", "two"])

    def next_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    status, out, _ = command(chat.main, "--engine-dir", engine_dir, "--device", "cpu", "--max-new-tokens", 5)
    messages = [{"role": "user", "content": "one"}]
    first = session.generate(messages, chat=True, max_new_tokens=5).outputs[0].text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
    second = session.generate(messages, chat=True, max_new_tokens=5).outputs[0].text
    assert (status, out) == (0, f"{first}\n{second}\n")


def test_a_chat_that_grows_too_long_goes_on(command, engine_dir, monkeypatch):
    """The engine's limit is 120 tokens, one for each character: one of these turns fits, two do not, 200 never do."""
    lines = iter(["a" * 40, "b" * 200, "c" * 40])

    def next_line(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    asked = []
    stream = qwen_model.Session.stream

    def seen_stream(session, prompts, **options):
        asked.extend([message["content"] for message in messages] for messages in prompts)
        return stream(session, prompts, **options)

    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr(qwen_model.Session, "stream", seen_stream)
    options = ("--engine-dir", engine_dir, "--device", "cpu", "--max-new-tokens", 3, "--system", "Be brief.")
    status, out, err = command(chat.main, *options)
    assert (status, out.count("\n")) == (0, 2)
    assert asked == [["Be brief.", "a" * 40], ["Be brief.", "c" * 40]]
    first, second = err.splitlines()
    assert first.startswith("error: this message makes 2")
    assert first.endswith("limit of 120")
    assert second == "note: 1 of the oldest turns left out: the engine's limit is 120 tokens"


@pytest.fixture
def templates_dir(model_dir, tmp_path):
    """An engine with a chat template of its own, and one of another name."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    start = "{% for m in messages %}{{ m.role[0] + m.content }}<|im_end|>{% endfor %}{{ tools }}"
    templates = [
        {"name": "default", "template": start + "{% if not quick %}think{% endif %}"},
        {"name": "rag", "template": "R" + start},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": templates}))
    qwen_model.build_engine(folder, output_dir=tmp_path / "engine", dtype="float32", max_input_len=100)
    return tmp_path / "engine"


def test_run_s_chat_options_reach_the_session(command, templates_dir, tmp_path):
    session = qwen_model.load_engine(templates_dir, device="cpu")
    (tmp_path / "tools.json").write_text('\ufeff[{"name": "f"}]', encoding="utf-8")
    (tmp_path / "own.jinja").write_text("own {{ messages[0].content }}")
    user = {"role": "user", "content": "Hi<|im_end|>"}
    cases = [
        (["--system", "Brief"], [{"role": "system", "content": "Brief"}, user], {}),
        (["--system", ""], [{"role": "system", "content": ""}, user], {}),
        (["--tools", tmp_path / "tools.json"], [user], {"tools": [{"name": "f"}]}),
        (["--chat-template-kwargs", '{"quick": true}'], [user], {"chat_template_kwargs": {"quick": True}}),
        (["--chat-template", "rag"], [user], {"chat_template": "rag"}),
        (["--chat-template", tmp_path / "own.jinja"], [user], {"chat_template": "own {{ messages[0].content }}"}),
        (["--sanitize-control-tokens"], [user], {"sanitize_control_tokens": True}),
        (["--stop-token-ids", "1,2"], [user], {"stop_token_ids": [1, 2]}),
    ]
    common = ["--engine-dir", templates_dir, "--device", "cpu", "--chat", user["content"]]
    for arguments, messages, options in cases:
        expected = session.generate(messages, chat=True, **options).outputs[0].text
        for more in ((), ("--stream",)):
            assert command(run.main, *common, *arguments, *more) == (0, expected + "\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tools", "nowhere.json"], "error: nowhere.json cannot be read"),
        (["--tools", "{}"], "error: {} cannot be read"),
        (["--chat-template", "nowhere.jinja"], "error: nowhere.jinja cannot be read"),
        (["--chat-template", "rags"], "error: the model has no chat template 'rags'; it has: default, rag"),
        (["--chat-template-kwargs", "{"], "error: --chat-template-kwargs is not JSON"),
        (["--chat-template-kwargs", "[" * 99999], "error: --chat-template-kwargs is not JSON"),
        (["--chat-template-kwargs", "[]"], "error: --chat-template-kwargs must be a JSON object, not list"),
        (["--chat-template-kwargs", '{"quik": 1}'], "error: the model's chat template has no variable quik"),
        (["--stop-token-ids", "x"], "error: --stop-token-ids takes integers"),
        (["--stop-token-ids", "999"], "error: stop_token_ids must be a list of token ids from 0 to 316"),
        (["--stop", "a<|im_end|>"], "error: stop 'a<|im_end|>' would never be found"),
    ],
)
def test_chat_options_that_are_wrong(command, templates_dir, arguments, message):
    status, out, err = command(run.main, "--engine-dir", templates_dir, "--device", "cpu", "--chat", "Hi", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", ["{}", '[{"name"', "\udcff"])
def test_tools_that_are_none(command, templates_dir, tmp_path, content):
    (tmp_path / "tools.json").write_bytes(content.encode(errors="surrogateescape"))
    common = ("--engine-dir", templates_dir, "--device", "cpu", "--chat", "Hi", "--tools", tmp_path / "tools.json")
    status, out, err = command(run.main, *common)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "tools.json" in err


@pytest.fixture
def talk(command, monkeypatch):
    """Run `chat` with these lines; return what it asks of the session, its exit status and its outputs."""

    def call(lines, *arguments):
        given, asked = iter(lines), []
        stream = qwen_model.Session.stream

        def next_line(prompt):
            try:
                return next(given)
            except StopIteration:
                raise EOFError from None

        def seen_stream(session, prompts, **options):
            asked.append(([dict(message) for message in prompts[0]], options))
            return stream(session, prompts, **options)

        monkeypatch.setattr("builtins.input", next_line)
        monkeypatch.setattr(qwen_model.Session, "stream", seen_stream)
        return asked, *command(chat.main, *arguments)

    return call


@pytest.mark.parametrize(
    ("arguments", "first"), [((), "user"), (("--system", ""), "system"), (("--system", "x"), "system")]
)
def test_chat_s_system_message(talk, engine_dir, arguments, first):
    asked, status, _, _ = talk(["hi"], "--engine-dir", engine_dir, "--device", "cpu", "--max-new-tokens", 2, *arguments)
    assert status == 0
    assert asked[0][0][0] == {"role": first, "content": arguments[1] if arguments else "hi"}


def test_chat_skips_blank_lines(talk, engine_dir):
    lines = ["", "one", " \t", "two", ""]
    asked, status, _, _ = talk(lines, "--engine-dir", engine_dir, "--device", "cpu", "--max-new-tokens", 2)
    typed = [messages[-1]["content"] for messages, _ in asked]
    assert (status, typed, len(asked[-1][0])) == (0, ["one", "two"], 3)


def test_chat_keeps_what_is_typed_text(talk, templates_dir, tmp_path):
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    common = ("--engine-dir", templates_dir, "--device", "cpu", "--max-new-tokens", 2)
    more = (
        "--tools",
        tmp_path / "tools.json",
        "--chat-template-kwargs",
        '{"quick": true}',
        "--chat-template",
        "default",
    )
    expected = {"tools": [{"name": "f"}], "chat_template_kwargs": {"quick": True}, "chat_template": "default"}
    for switch, sanitize in (((), True), (("--no-sanitize-control-tokens",), False)):
        asked, status, _, _ = talk(["a<|im_end|>", "b"], *common, *more, *switch)
        assert status == 0
        assert len(asked) == 2
        for _, options in asked:
            assert options.items() >= {**expected, "sanitize_control_tokens": sanitize}.items()


def test_chat_counts_the_tokens_that_it_sends(talk, templates_dir):
    """The limit is 100 tokens: <|im_end|> is ten as text, one as a control token."""
    line = "<|im_end|>" * 9 + "a"  # with the template 19 or 100 tokens
    common = ("--engine-dir", templates_dir, "--device", "cpu", "--max-new-tokens", 2)
    for switch, fits in (((), False), (("--no-sanitize-control-tokens",), True)):
        asked, status, _, err = talk([line], *common, *switch)
        assert status == 0
        assert (len(asked) == 1, "more than the engine's limit" in err) == (fits, not fits)


def test_several_prompts_in_text_are_told_apart(command, engine_dir, session):
    common = ("--engine-dir", engine_dir, "--device", "cpu", "--max-new-tokens", 5)
    long = "x" * 100
    texts = [session.generate(prompt, max_new_tokens=5).outputs[0].text for prompt in ("a\nb", long, [1, 2])]
    headings = ["==> a\\nb <==", f"==> {'x' * 69}... <==", "==> 1,2 <=="]
    expected = "\n\n".join(f"{heading}\n{text}" for heading, text in zip(headings, texts, strict=True)) + "\n"
    for more in ((), ("--stream",)):
        assert command(run.main, *common, *more, "a\nb", long, "--input-ids", "1,2") == (0, expected, "")


def test_a_stream_checks_every_prompt_first(command, engine_dir):
    options = ("--engine-dir", engine_dir, "--device", "cpu", "--stream")
    status, out, err = command(run.main, *options, "fine", "--input-ids", "5000")
    assert (status, out) == (1, "")
    assert "token id 5000" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine-dir", "nowhere", "Hi"], "error: nowhere is not an engine; make one with"),
        (["--input-ids", "1,x"], "error: --input-ids takes integers"),
        (["--input-ids", "1,5000"], "error: the prompt has the token id 5000"),
        (["--temperature", "-1", "Hi"], "error: temperature must be"),
        (["--engine-dir", "nowhere", "--top-p", "2", "Hi"], "error: top_p must be"),
        (["--max-new-tokens", "1000", "Hi"], "error: max_new_tokens 1000 is more than"),
        (["--input-file", "nowhere.txt"], "error: nowhere.txt cannot be read"),
        (["--device", "abacus", "Hi"], "error: device must be"),
    ],
)
def test_errors_are_one_line(command, engine_dir, arguments, message):
    place = [] if "--engine-dir" in arguments else ["--engine-dir", engine_dir]
    device = [] if "--device" in arguments else ["--device", "cpu"]
    status, out, err = command(run.main, *place, *device, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--system", "x", "Hi"],
        ["--tools", "x", "Hi"],
        ["--stream", "--json", "Hi"],
        ["--stream", "--num-beams", "2", "Hi"],
        ["--logprobs", "2", "Hi"],
        ["--n", "0", "Hi"],
    ],
)
def test_usage_errors(command, arguments):
    status, out, err = command(run.main, *arguments)
    assert (status, out) == (2, "")
    assert "usage:" in err


def test_inspect_says_what_is_wrong_before_it_prints(command, engine_dir, tmp_path):
    for arguments, message in (
        ([engine_dir, "--picture", tmp_path / "picture.svg"], "error: --picture draws the layers of a TensorRT engine"),
        ([engine_dir, "--engine-dir", engine_dir], "error: give the engine once"),
        (["", "--device", "cpu"], "error: . is not an engine"),
    ):
        status, out, err = command(inspect.main, *arguments)
        assert (status, out) == (1, "")
        assert err.startswith(message)


def test_build_says_what_is_wrong(command, tmp_path):
    status, out, err = command(build.main, "--model-dir", tmp_path, "--output-dir", tmp_path / "engine")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {tmp_path} is not a Hugging Face checkpoint")


def test_a_log_gets_no_progress_bar(command, model_dir, tmp_path):
    status, _, err = command(build.main, "--model-dir", model_dir, "--output-dir", tmp_path / "engine")
    assert (status, err) == (0, "")


def test_rotary_scaling_argument():
    assert parse_rotary_scaling("linear:4") == {"rope_type": "linear", "factor": 4.0}
    assert parse_rotary_scaling("none") == {"rope_type": "none"}
    assert parse_rotary_scaling('{"rope_type": "yarn", "factor": 2}') == {"rope_type": "yarn", "factor": 2}
    for wrong in ("linear:x", "{"):
        with pytest.raises(QwenModelError, match="--rotary-scaling"):
            parse_rotary_scaling(wrong)


def test_token_ids_argument():
    assert parse_token_ids("1,2, 3") == parse_token_ids("1 2 3") == [1, 2, 3]
    assert parse_token_ids("") == []
    for text in ("1,,2", "1,", ",1", ",", "1;2", "1_0", "1.0", "9" * 5000):
        with pytest.raises(QwenModelError, match="--input-ids takes integers with commas between them"):
            parse_token_ids(text)


def test_one_command_for_all(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(r"qwen-model (\S+)\n", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="0"):
        main([])
    listed = capsys.readouterr().out
    for name, module in COMMANDS.items():
        assert f"    {name} " in listed
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: qwen-model {name} ")
        assert module.__name__ == f"qwen_model.{name}"
    with pytest.raises(SystemExit, match="2"):
        main(["bild"])
    assert "invalid choice: 'bild'" in capsys.readouterr().err


def test_shell_completion_knows_the_options(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    for word in ("--disable-plugin", "rms_norm gemm rotary", "--num-beams", "--picture"):
        assert word in script


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("build --model-dir mo", "models"),
        ("run --engine-dir mo", "models"),
        ("inspect mo", "models"),
        ("perplexity --text-file mo", "models moon.txt"),
        ("run --chat-template mo", "models moon.txt"),
        ("inspect --picture mo", "models moon.txt"),
        ("export --output mo", "models moon.txt"),
    ],
)
def test_shell_completion_of_paths(words, completed, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "moon.txt").touch()
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    script += f"\nCOMP_WORDS=(qwen-model {words}); COMP_CWORD={len(words.split())}; _shtab_qwen_model\n"
    script += 'echo "${COMPREPLY[@]}"'
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert sorted(found.stdout.split()) == completed.split(), found.stderr
