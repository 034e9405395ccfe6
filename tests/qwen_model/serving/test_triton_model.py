"""Test the model of deploy/triton without Triton: the codes of its errors, which clients of Triton do not see."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import queue
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qwen_model

from .triton_process import REPOSITORY

pytestmark = pytest.mark.server
FINAL = 1
LONG = {"text_input": "x", "max_tokens": np.int32(1500), "ignore_eos": True}
PARAMETERS = {"engine_dir": "engine", "gpu_memory_utilization": "0.9", "max_waiting": "1", "request_timeout": "60"}


@dataclass
class TritonError:
    message: str
    code: str
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"


@dataclass
class InferenceResponse:
    tensors: Any = None
    error: TritonError | None = None


class Sender:
    """Take the responses to one request."""

    def __init__(self) -> None:
        self.cancelled = False
        self._responses: queue.SimpleQueue[tuple[InferenceResponse, int]] = queue.SimpleQueue()

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        self._responses.put((response, flags))

    def response(self) -> InferenceResponse:
        """Return the next response."""
        return self._responses.get(timeout=60)[0]

    def failure(self) -> tuple[str, str]:
        """Return the code and the text of the error that the last response has."""
        flags = 0
        while flags != FINAL:
            response, flags = self._responses.get(timeout=60)
        assert response.error is not None
        assert self._responses.empty()
        return response.error.code, response.error.message


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the model with an engine of one slot, and room for one request that waits."""
    repository = tmp_path_factory.mktemp("triton")
    limits = {"max_batch_size": 1, "max_input_len": 512, "max_output_len": 1500}
    qwen_model.build_engine(output_dir=repository / "1" / "engine", dtype="float32", **limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", _utilities())
        spec = importlib.util.spec_from_file_location("triton_model", Path(REPOSITORY, "qwen", "1", "model.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    loaded = module.TritonPythonModel()
    config = {"parameters": {name: {"string_value": value} for name, value in PARAMETERS.items()}}
    place = {"model_name": "qwen", "model_repository": str(repository), "model_version": "1"}
    loaded.initialize({**place, "model_config": json.dumps(config), "model_instance_kind": "CPU"})
    yield loaded
    loaded.finalize()
    assert not multiprocessing.active_children()


def _utilities() -> ModuleType:
    """Return what stands in for Triton's module: the names that the model uses."""
    module = ModuleType("triton_python_backend_utils")
    log = SimpleNamespace(log_error=print)
    module.__dict__.update(TritonError=TritonError, InferenceResponse=InferenceResponse, Logger=log)
    module.__dict__.update(Tensor=lambda name, array: (name, array), TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL)
    return module


def send(model: Any, **inputs: Any) -> Sender:
    """Send a request, with Triton's types."""
    sender = Sender()
    arrays = {
        name: np.array([value.encode()], np.object_) if isinstance(value, str) else np.array([value])
        for name, value in inputs.items()
    }
    tensors = [SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: a) for name, array in arrays.items()]
    model.execute([SimpleNamespace(inputs=lambda: tensors, get_response_sender=lambda: sender)])
    return sender


def test_a_wrong_input(model: Any) -> None:
    assert send(model).failure() == ("INVALID_ARG", "give either text_input or messages")
    assert send(model, text_input="x", top_p=np.float32(2)).failure()[0] == "INVALID_ARG"


def test_too_many_requests_and_clients_that_go_away(model: Any) -> None:
    running = send(model, stream=True, **LONG)
    assert running.response().error is None
    waiting = send(model, **LONG)
    refused = send(model, **LONG)
    assert refused.failure() == ("UNAVAILABLE", "1 requests are waiting already: try again later")
    for sender in (running, waiting):
        sender.cancelled = True
        assert sender.failure() == ("CANCELLED", "the client has gone")


def test_an_engine_that_ends_is_started_again(model: Any) -> None:
    running = send(model, stream=True, **LONG)
    assert running.response().error is None
    [engine] = multiprocessing.active_children()
    engine.kill()
    assert running.failure() == ("UNAVAILABLE", "the engine has ended: try again later")
    end = time.monotonic() + 120
    while (answer := send(model, text_input="x").response()).error is not None and time.monotonic() < end:
        time.sleep(0.1)
    assert answer.error is None
    assert not engine.is_alive()
