"""Serve the packaged model's tokenizer over a stub of the engine, in a thread, to real HTTP clients."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from qwen_model.checkpoints.tokenizer import load_tokenizer
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.serving.app import make_app
from qwen_model.serving.context import Context, ServerLimits
from qwen_model.serving.generation import ServerModel

from .stub_engine import StubEngine

NAME = "packaged"
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}"
    "{{ tool | tojson }}\n{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The packaged model's, with tools as Qwen2.5 writes them."""
REPLY = "I <b>think</b>. 3 < 4 — ünï 😀\n"


@dataclass
class Served:
    """Hold a running server, its stub of an engine, and a client."""

    url: str
    engine: StubEngine
    context: Context
    http: httpx.Client

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def openai(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture(scope="session")
def packaged_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import qwen_model

    folder = tmp_path_factory.mktemp("serving") / NAME
    qwen_model.build_engine(output_dir=folder, dtype="float32")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def serve_stub(packaged_engine: Path) -> Iterator[Callable[..., Served]]:
    running = []

    def start(
        limits: ServerLimits | None = None,
        api_keys: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
    ) -> Served:
        tokenizer = load_tokenizer(packaged_engine)
        engine = StubEngine(tokenizer, lambda request: REPLY)
        model = ServerModel(NAME, EngineConfig.read(packaged_engine), tokenizer, int(time.time()))
        context = Context(model, limits or ServerLimits(), api_keys)
        app = make_app(context, lambda: context.client.connect(engine.connection), origins, hosts)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while not server.started:
            time.sleep(0.01)
        client = httpx.Client(base_url=url, timeout=20)
        running.append((server, thread, client))
        return Served(url, engine, context, client)

    yield start
    for server, thread, client in running:
        client.close()
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def served(serve_stub: Callable[..., Served]) -> Served:
    return serve_stub()
