"""Test what the command checks before it loads an engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from qwen_model import serve
from qwen_model.common.errors import QwenModelError
from qwen_model.serving import supervisor


@pytest.fixture
def options(packaged_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs the command, and returns the options that the server would have."""

    def run(*arguments: str, key: str | None = None) -> Any:
        found = []
        monkeypatch.setattr(supervisor, "serve", lambda options: found.append(options) or 0)
        monkeypatch.delenv("QWEN_MODEL_API_KEY", raising=False)
        if key is not None:
            monkeypatch.setenv("QWEN_MODEL_API_KEY", key)
        with pytest.raises(SystemExit):
            serve.main(["--engine-dir", str(packaged_engine), *arguments])
        return found[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--api-key", ""], None, "--api-key is empty"),
        (["--api-key", " "], None, "--api-key is empty"),
        (["--api-key", "good", "--api-key", ""], None, "--api-key is empty"),
        (["--api-key", ""], "good", "--api-key is empty"),
        ([], "", "QWEN_MODEL_API_KEY is empty"),
        (["--api-key", "good"], "", "QWEN_MODEL_API_KEY is empty"),
        (["--api-key", "key "], None, "white space"),
    ],
)
def test_a_key_that_is_none_is_refused(options: Any, arguments: list[str], key: str | None, expected: str) -> None:
    with pytest.raises(QwenModelError, match=expected):
        options(*arguments, key=key)


def test_keys_of_both_sources_count(options: Any) -> None:
    assert options("--api-key", "a", "--api-key", "b", key="c").api_keys == ("a", "b", "c")


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.0.2.1", None, True),
        ("model.example", None, True),
        ("0.0.0.0", "good", False),
        ("127.0.0.1", None, False),
        ("127.0.0.2", None, False),
        ("::1", None, False),
        ("localhost", None, False),
    ],
)
def test_an_open_server_warns(
    options: Any, capsys: pytest.CaptureFixture[str], host: str, key: str | None, warns: bool
) -> None:
    assert options("--host", host, key=key).allowed_hosts == (host,)
    assert ("it has no API key" in capsys.readouterr().err) == warns


def test_allowed_hosts_are_those_given(options: Any) -> None:
    found = options("--host", "model.example", "--allowed-host", "a.example", "--allowed-host", "b.example")
    assert found.allowed_hosts == ("model.example", "a.example", "b.example")


@pytest.mark.parametrize(("text", "shown"), [("Invalid HTTP request received.", False), ("something else", True)])
def test_malformed_requests_do_not_fill_the_log(text: str, shown: bool) -> None:
    record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, text, None, None)
    assert supervisor._is_no_malformed_request(record) == shown
