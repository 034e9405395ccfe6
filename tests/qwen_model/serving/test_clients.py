"""Test the server with clients that nobody here wrote, the examples, and our own chat, over a stub of the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from qwen_model.chat import main as chat
from qwen_model.common.errors import QwenModelError

from .served import NAME, REPLY, Served
from .stub_engine import Add

EXAMPLES = Path(__file__).parents[3] / "examples"
HELLO = [{"role": "user", "content": "Hello"}]


def reply_with_tools(served: Served) -> None:
    """Let the model call a tool, and answer once it has the result."""
    tokenizer = served.context.model.tokenizer

    def reply(request: Add) -> str:
        prompt = tokenizer.decode(request.prompt, skip_special_tokens=False)
        if request.grammar is not None:
            name = "get_weather" if "get_weather" in prompt and prompt.endswith("<tool_call>\n") else None
            return json.dumps({"name": name, "arguments": {"city": "Paris"}} if name else {"city": "Paris"})
        if "multiply" not in prompt:
            return REPLY
        if "7006652" in prompt:
            return "It is 7006652."
        return '<tool_call>\n{"name": "multiply", "arguments": {"a": 1234, "b": 5678}}\n</tool_call>'

    served.engine.reply = reply


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("plain.py", "json", "think"),
        ("async_stream.py", "httpx", "think"),
        ("openai_chat.py", "openai", "get_weather {'city': 'Paris'}"),
        ("openai_stream.py", "openai", "tokens"),
        ("langchain_agent.py", "langchain_openai", "It is 7006652."),
        ("requests.sh", None, '"tokens"'),
    ],
)
def test_examples(served: Served, name: str, module: str | None, expected: str) -> None:
    if module is not None:
        pytest.importorskip(module)
    reply_with_tools(served)
    command = [str(EXAMPLES / name)] if module is None else [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run([*command, served.url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("plain.py", "json"),
        ("async_stream.py", "httpx"),
        ("openai_chat.py", "openai"),
        ("openai_stream.py", "openai"),
        ("langchain_agent.py", "langchain_openai"),
    ],
)
@pytest.mark.parametrize("fault", ["no server", "an error"])
def test_examples_say_what_is_wrong_in_one_line(served: Served, name: str, module: str, fault: str) -> None:
    """A model whose template takes no tools, for example, is an error of that kind."""
    pytest.importorskip(module)
    served.engine.refusal = (400, "the model's chat template takes no tools")
    url = served.url if fault == "an error" else "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), url], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert ("takes no tools" if fault == "an error" else f"no server at {url}") in done.stderr


def test_every_example_is_in_their_table() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.name})" in text for path in EXAMPLES.iterdir() if path.name != "README.md")


@pytest.mark.filterwarnings("ignore:Item")  # litellm's own types
@pytest.mark.parametrize("stream", [False, True])
def test_litellm(served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    answer = litellm.completion(
        model=f"openai/{NAME}", api_base=f"{served.url}/v1", api_key="none", messages=HELLO, stream=stream
    )
    if stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == REPLY
    else:
        assert answer.choices[0].message.content == REPLY


def test_schemathesis(served: Served, tmp_path: Path) -> None:
    """Bodies that are valid and ones that are not, made from the server's own OpenAPI document: never a 500."""
    pytest.importorskip("schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"]
    settings = ["--checks", "not_a_server_error", "--max-examples", "20", "--phases", "fuzzing", "--seed", "1"]
    done = subprocess.run(
        [*command, *settings, "--no-color"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(lines: list[str], *options: str) -> str:
        typed = iter(lines)
        monkeypatch.setattr("qwen_model.chat._read_line", lambda: next(typed, None))
        chat([*options])
        return capsys.readouterr().out

    return run


def test_our_chat_talks_to_a_server(served: Served, talk: Any) -> None:
    served.engine.reply = lambda request: "<think>\nHm.\n</think>\n\n4"
    said = talk(["2 + 2", "again"], "--url", served.url, "--system", "Be brief.", "--temperature", "0.5", "--seed", "3")
    assert said == "<think>\nHm.\n</think>\n\n4\n" * 2
    first, second = (request for request in served.engine.requests if isinstance(request, Add))
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}]
    conversation += [{"role": "assistant", "content": "4"}, {"role": "user", "content": "again"}]
    template = served.context.model.tokenizer.apply_chat_template
    assert first.prompt == template(conversation[:2])
    assert second.prompt == template(conversation)
    assert first.sampling["temperature"] == 0.5
    assert first.sampling["seed"] == 3
    assert first.max_new_tokens == 128


def test_our_chat_shows_tool_calls_as_the_model_wrote_them(served: Served, talk: Any, tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    served.engine.reply = lambda request: call
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]))
    assert talk(["x"], "--url", served.url, "--tools", str(tools)).strip() == call


def test_our_chat_leaves_out_what_is_too_long(served: Served, talk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    limit = served.context.model.config.limits.max_input_len
    long = " ".join(["word"] * (limit // 3))
    assert talk([long, long, long], "--url", served.url).count(REPLY) == 3
    with pytest.raises(QwenModelError, match=str(limit)):
        talk([" ".join(["word"] * 2 * limit)], "--url", served.url)


def test_our_chat_says_what_is_wrong(served: Served, talk: Any) -> None:
    with pytest.raises(QwenModelError, match="begins with http"):
        talk(["x"], "--url", "localhost:8000")
    with pytest.raises(QwenModelError, match="--engine-dir is an engine's, and --url a server's"):
        talk(["x"], "--url", served.url, "--engine-dir", "engine")
    with pytest.raises(QwenModelError, match="--tuning is an engine's"):
        talk(["x"], "--url", served.url, "--no-tuning")
    with pytest.raises(QwenModelError, match="--generation-config is an engine's"):
        talk(["x"], "--url", served.url, "--generation-config", "none")
    with pytest.raises(QwenModelError, match="greater than or equal to 1, given: 0"):
        talk(["x"], "--url", served.url, "--max-new-tokens", "0")
    with pytest.raises(QwenModelError, match="needs --url"):
        talk(["x"], "--api-key", "k")
    with pytest.raises(QwenModelError, match="--api-key is empty"):
        talk(["x"], "--url", served.url, "--api-key", "")
    with pytest.raises(QwenModelError, match="cannot be reached"):
        talk(["x"], "--url", "http://127.0.0.1:9")
    with pytest.raises(QwenModelError, match="own chat template"):
        talk(["x"], "--url", served.url, "--chat-template", "{{ 1 }}")
    served.engine.refusal = (429, "too many requests wait")
    with pytest.raises(QwenModelError, match="too many requests wait"):
        talk(["x"], "--url", served.url)
    served.engine.refusal = None
    served.engine.holds = True
    threading.Timer(0.5, served.engine.end).start()
    with pytest.raises(QwenModelError, match="engine has ended"):
        talk(["x"], "--url", served.url)
