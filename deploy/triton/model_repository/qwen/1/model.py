"""Serve an engine from Triton's Python back end, with the engine's process and the API of qwen_model's server.

Triton's thread hands requests over to an event loop and takes the next ones at once, so that the scheduler batches all
that there are. The event loop sends each request's responses as its tokens come.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from pydantic import ValidationError

from qwen_model import QwenModelError, load_engine
from qwen_model.checkpoints.tokenizer import load_tokenizer
from qwen_model.interface.engine_config import EngineConfig
from qwen_model.serving import chat_api, completions_api
from qwen_model.serving.context import Context, ServerLimits
from qwen_model.serving.errors import ApiError
from qwen_model.serving.field_errors import wrong_value
from qwen_model.serving.generation import Generation, Job, Piece, ServerModel
from qwen_model.serving.schemas import ChatRequest, CompletionRequest
from qwen_model.serving.supervisor import start_engine

WATCH_SECONDS = 0.1
"""How often Triton is asked whose clients have gone, which it does not say by itself."""
RESTART_SECONDS = 10
SHUTDOWN_SECONDS = 30
CODES = {400: "INVALID_ARG", 408: "UNAVAILABLE", 429: "UNAVAILABLE", 503: "UNAVAILABLE"}
"""Triton's names of errors for statuses of HTTP; all others are INTERNAL."""
FIELDS = {"text_input": "prompt", "stop_words": "stop"}
"""OpenAI's names of the inputs that have other ones."""


class TritonPythonModel:
    """Answer the requests of an instance of the model, with an engine of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. Triton logs what is raised."""
        given = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in given.items()}
        engine_dir = Path(args["model_repository"], args["model_version"], parameters["engine_dir"])
        self._load = partial(
            load_engine,
            engine_dir,
            device=f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu",
            gpu_memory_utilization=float(parameters["gpu_memory_utilization"]),
        )
        limits = ServerLimits(max_waiting=int(parameters["max_waiting"]), timeout=float(parameters["request_timeout"]))
        config, tokenizer = EngineConfig.read(engine_dir), load_tokenizer(engine_dir)
        self._context = Context(ServerModel(args["model_name"], config, tokenizer, int(time.time())), limits)
        self._running: dict[Any, asyncio.Task[None]] = {}  # by what sends the responses
        connection = self._start_engine()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._context.client.connect(connection), self._loop).result()
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def execute(self, requests: list[Any]) -> None:
        """Begin to answer requests, and return at once: their responses come later."""
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            self._loop.call_soon_threadsafe(self._start, inputs, request.get_response_sender())

    def finalize(self) -> None:
        """End the engine; Triton has waited for the requests."""
        self._watching.cancel()  # or it would start another one
        asyncio.run_coroutine_threadsafe(self._context.client.close(), self._loop).result()
        self._engine.join(SHUTDOWN_SECONDS)
        self._engine.kill()

    def _start_engine(self) -> socket.socket:
        """Start the engine's process, and return a connection to it."""
        connection, engine_end = socket.socketpair()
        with engine_end:
            self._engine = start_engine(self._load, [engine_end], self._context.limits.max_waiting)
        return connection

    async def _watch(self) -> None:
        """End what nobody waits for any more. Start the engine again if it ends: Triton would not."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for sender, task in tuple(self._running.items()):
                if sender.is_cancelled():
                    task.cancel()
            if not self._context.client.alive:
                pb_utils.Logger.log_error("the engine has ended, and is started again")
                try:
                    await self._context.client.connect(await asyncio.to_thread(self._start_engine))
                except (QwenModelError, OSError) as error:
                    pb_utils.Logger.log_error(f"the engine cannot be loaded: {error}")
                    await asyncio.sleep(RESTART_SECONDS)

    def _start(self, inputs: dict[str, np.ndarray], sender: Any) -> None:
        self._running[sender] = asyncio.create_task(self._answer(inputs, sender))

    async def _answer(self, inputs: dict[str, np.ndarray], sender: Any) -> None:
        """Send the responses to a request. The last one always comes: a client would wait for it without end."""
        try:
            fields = {FIELDS.get(name, name): _value(name, array) for name, array in inputs.items()}
            stream = fields.pop("stream", False)
            job = await _job(self._context, fields)
            answer = Piece(0)  # what has not been sent
            generation = Generation(job, self._context.model, self._context.client, self._context.limits.timeout)
            async for piece in generation.pieces():
                answer.text += piece.text
                answer.tokens += piece.tokens
                answer.finish_reason = piece.finish_reason
                if stream and piece.finish_reason is None:
                    sender.send(_response(answer))
                    answer = Piece(0)
            last = _response(answer)
        except ApiError as error:
            last = _failure(error.message, CODES.get(error.status, "INTERNAL"))
        except asyncio.CancelledError:
            last = _failure("the client has gone", "CANCELLED")
        except Exception as error:
            pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
            last = _failure("the request failed: Triton's log says why", "INTERNAL")
        del self._running[sender]
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _value(name: str, array: np.ndarray) -> Any:
    """Return the value of an input; that of stop_words is a list.

    Raises:
        ApiError: a string is not UTF-8.
    """
    try:
        values = [each.decode() if isinstance(each, bytes) else each for each in array.tolist()]
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error
    return values if name == "stop_words" else values[0]


async def _job(context: Context, fields: dict[str, Any]) -> Job:
    """Return what is to be generated, from fields with OpenAI's names.

    Raises:
        ApiError: a field is wrong.
    """
    if ("prompt" in fields) == ("messages" in fields):
        raise ApiError(400, "give either text_input or messages")
    try:
        if "prompt" in fields:
            return await completions_api.prepare(context, CompletionRequest.model_validate(fields), context.salt)
        fields["messages"] = json.loads(fields["messages"])
        return (await chat_api.prepare(context, ChatRequest.model_validate(fields), context.salt)).job
    except ValidationError as error:
        raise wrong_value(error.errors(), fields) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"messages is not JSON: {error}") from error


def _response(piece: Piece) -> Any:
    ids = np.array([token.token for token in piece.tokens], np.int32)
    texts = {"text_output": piece.text, "finish_reason": piece.finish_reason or ""}
    tensors = [pb_utils.Tensor(name, np.array([text.encode()], np.object_)) for name, text in texts.items()]
    return pb_utils.InferenceResponse([*tensors, pb_utils.Tensor("output_ids", ids)])


def _failure(message: str, kind: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, kind)))
