"""Compare our server with vLLM's, on random weights in the shape of a published model, with one load for both.

    python -m benchmarks.serving [--implementations vllm qwen_model session] [--quantization int4]

Loads: `fixed`, prompts of 512 tokens and 256 new ones each, and `mixed`, lengths like those of ShareGPT's
conversations (see benchmarks.throughput_offline). Each is sent all at once with at most twice as many requests under
way as there are slots (saturation), and then at half and nine tenths of the first implementation's saturation, in a
Poisson process. Last, one user at a time. Prompts are token ids, the choice is greedy, an output has its length
whatever its tokens are, and every request is a stream. `session` is one user's tokens through `Session.stream`, without
a server. The load comes from processes of its own, which count the events of the streams and their times.

With --quantization both servers have the same formats of weights (vLLM's are those of compressed-tensors), with
smoothquant and fp8 a scale for each token's x, and a head of 16 bits unless --head-quantization gives ours another.

Both servers decode with the same tokenizer, whose tokens are two to four random letters. The results are a file,
serving.json, or serving_int4.json and so on.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.common import RESULTS, write_results
from benchmarks.generate import weights_text
from benchmarks.throughput_offline import LONGEST, Request, requests
from qwen_model.quantization.options import EIGHT_BIT_KINDS, QUANTIZATIONS

if TYPE_CHECKING:
    from qwen_model.engine.session import Session

MODEL = "random"
START_SECONDS = 540
FIXED_PROMPT, FIXED_OUTPUT = 512, 256
ALONE = 8
"""Requests of one user."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A Result is one line of the results; times are milliseconds. request_rate: requests a second; None: at once."""

    implementation: str
    shape: str
    dtype: str
    load: str
    request_rate: float | None
    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    new_tokens_per_second: float
    first_token_p50: float
    first_token_p99: float
    per_token_p50: float
    per_token_p99: float
    between_events_p50: float
    between_events_p99: float
    error: str | None


@dataclasses.dataclass
class Record:
    """A Record is what happened to one request: when it was sent, when events of text came, and its tokens."""

    sent: float
    arrivals: list[float]
    new_tokens: int
    error: str | None


# The model: a folder that both servers read.


def write_model(folder: Path, values: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the configurations of a checkpoint and of an engine without weights, and a tokenizer, into two folders."""
    from benchmarks.generate_torch import random_formats, vllm_values
    from qwen_model.checkpoints.config import read_config
    from qwen_model.interface.engine_config import EngineConfig, Limits

    model = read_config(values)
    limits = Limits(options.max_batch_size, LONGEST, LONGEST)
    kinds = {"kv_cache_dtype": options.kv_cache_dtype, "weight_formats": dict(random_formats(options, model))}
    engine = EngineConfig("torch", options.dtype, limits, model, (), 0, {}, **kinds)
    for name in ("checkpoint", "engine"):
        (folder / name).mkdir()
        write_tokenizer(folder / name, values["vocab_size"])
    published = {**vllm_values(values, options), "torch_dtype": options.dtype}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(published))
    engine.write(folder / "engine")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer of random tokens; the last three are ChatML's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(tokens) < vocab_size - len(special):
        tokens["".join(draw.choices(letters, k=draw.randint(2, 4)))] = None
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def load_random(engine_dir: Path, device: str) -> Session:
    """Return a session of an engine's configuration with random weights; only the HTTP processes need a tokenizer."""
    import torch

    from benchmarks.generate_torch import random_session, random_weights
    from qwen_model.interface.engine_config import EngineConfig

    config = EngineConfig.read(engine_dir)
    weights = random_weights(config.model, getattr(torch, config.dtype), device, config.weight_formats)
    return random_session(config.model, weights, config.limits, config.kv_cache_dtype, config.weight_formats)


# The servers.


def serve_ours(engine_dir: Path, port: int, device: str, http_processes: int) -> int:
    """Be our server."""
    from benchmarks.serving import load_random as load  # by the module's name, for pickle
    from qwen_model.serving.context import ServerLimits
    from qwen_model.serving.supervisor import ServerOptions, default_http_processes, serve

    processes = http_processes or default_http_processes()
    limits = ServerLimits(max_waiting=1 << 20)
    session = partial(load, engine_dir, device)
    options = ServerOptions(engine_dir, MODEL, session, "127.0.0.1", port, processes, (), (), (), limits, 10.0, False)
    return serve(options)


def our_command(folder: Path, port: int, options: argparse.Namespace) -> list[str]:
    """Return the command that starts our server."""
    settings = ["--port", str(port), "--device", options.device, "--http-processes", str(options.http_processes)]
    return [sys.executable, "-m", "benchmarks.serving", "--serve", str(folder / "engine"), *settings]


def vllm_command(folder: Path, port: int, options: argparse.Namespace) -> list[str]:
    """Return the command that starts vLLM's server."""
    settings = {
        "--load-format": "dummy",
        "--dtype": options.dtype,
        "--port": str(port),
        "--served-model-name": MODEL,
        "--max-model-len": str(2 * LONGEST),
        "--max-num-seqs": str(options.max_batch_size),
        "--gpu-memory-utilization": "0.9",
        "--worker-extension-cls": "benchmarks.vllm_weights.WorkerExtension",
    }
    cache = ["--kv-cache-dtype", "fp8"] if options.kv_cache_dtype == "fp8" else []
    flags = ["--no-enable-prefix-caching", *cache, *options.vllm_arguments.split()]
    flat = [text for pair in settings.items() for text in pair]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "checkpoint")]
    return [*command, *flat, *flags]


class Server:
    """A Server is a process that is started, and ended with the context."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        make = {"qwen_model": our_command, "vllm": vllm_command}[name]
        self.log = folder / f"{name}.log"
        path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                make(folder, self.port, options), stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self._needs_weights = name == "vllm"

    def __enter__(self) -> Server:
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self._answers("/health"):
            if self._process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the server does not start:\n{excerpt(self.log.read_text())}")
            time.sleep(0.5)
        if self._needs_weights and not self._answers("/collective_rpc", b'{"method": "fill_weights"}'):
            raise SystemExit(f"vLLM's weights cannot be filled:\n{excerpt(self.log.read_text())}")

    def __exit__(self, *exception: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def _answers(self, path: str, body: bytes | None = None) -> bool:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False


def excerpt(log: str) -> str:
    """Return the lines of a log that name an error, and its end: vLLM says first what failed, and much after it."""
    named = [line for line in log.splitlines() if re.search(r"Error\b|error:", line)]
    return "\n".join([*dict.fromkeys(named[:20]), "...", log[-2000:]])


# The load.


def drive(port: int, given: list[tuple[float, Request]], start: float, concurrency: int) -> list[Record]:
    """Be a process of the load: send each request at its time after `start`, an instant of `time.time`."""
    return asyncio.run(_drive(port, given, start, concurrency))


async def _drive(port: int, given: list[tuple[float, Request]], start: float, concurrency: int) -> list[Record]:
    free = asyncio.Semaphore(concurrency)

    async def one(due: float, request: Request) -> Record:
        await asyncio.sleep(max(0.0, start + due - time.time()))
        async with free:
            return await _send(port, request)

    return list(await asyncio.gather(*(one(due, request) for due, request in given)))


async def _send(port: int, request: Request) -> Record:
    body = {
        "model": MODEL,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    host = f"Host: 127.0.0.1:{port}"  # our server answers to the names of its address alone
    head = f"POST /v1/completions HTTP/1.1\r\n{host}\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    sent = time.perf_counter()
    arrivals: list[float] = []
    tokens, status, last = 0, b"", b""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        status = await reader.readline()
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                arrivals.append(time.perf_counter())
                last = line
        writer.close()
        tokens = json.loads(last[6:])["usage"]["completion_tokens"]
        arrivals.pop()  # the usage
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        return Record(sent, arrivals, tokens, f"{status!r} {last[:200]!r} {error!r}")
    return Record(sent, arrivals, tokens, None if tokens == request.new_tokens else f"{tokens} tokens came")


class Load:
    """A Load sends requests from several processes at once."""

    def __init__(self, port: int, processes: int):
        self._port, self._processes = port, processes
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def run(self, given: list[Request], rate: float | None, concurrency: int) -> tuple[list[Record], float]:
        """Return the records of all requests, and the seconds from the first to the end of the last."""
        gaps = np.random.default_rng(0).exponential(0.0 if rate is None else 1 / rate, len(given))
        timed = list(zip(np.cumsum(gaps).tolist(), given, strict=True))
        count = min(self._processes, concurrency)
        start = time.time() + 0.5
        shares = [(timed[i::count], concurrency // count + (i < concurrency % count)) for i in range(count)]
        futures = [self._pool.submit(drive, self._port, share, start, most) for share, most in shares]
        records = [record for future in futures for record in future.result()]
        return records, max(0.001, time.time() - start)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()


def result(
    name: str, options: argparse.Namespace, load: str, rate: float | None, records: list[Record], seconds: float
) -> Result:
    """Sum up the records of one run."""
    good = [record for record in records if record.error is None]
    errors = [record.error for record in records if record.error is not None]
    first = [record.arrivals[0] - record.sent for record in good if record.arrivals]
    per_token = [
        (record.arrivals[-1] - record.arrivals[0]) / (record.new_tokens - 1)
        for record in good
        if len(record.arrivals) > 1
    ]
    gaps = [gap for record in good for gap in np.diff(record.arrivals).tolist()]
    new_tokens = sum(record.new_tokens for record in good)
    (first_p50, first_p99), (token_p50, token_p99), (gap_p50, gap_p99) = map(_percentiles, (first, per_token, gaps))
    found = Result(
        name,
        options.shape,
        weights_text(options, name),
        load,
        None if rate is None else round(rate, 3),
        len(records),
        len(errors),
        seconds=round(seconds, 3),
        requests_per_second=round(len(good) / seconds, 3),
        new_tokens_per_second=round(new_tokens / seconds, 1),
        first_token_p50=first_p50,
        first_token_p99=first_p99,
        per_token_p50=token_p50,
        per_token_p99=token_p99,
        between_events_p50=gap_p50,
        between_events_p99=gap_p99,
        error=errors[0] if errors else None,
    )
    print(
        f"{name:10} {load:6} {'' if rate is None else f'{rate:.1f}/s':>8} {len(good):5} requests in {seconds:6.1f} s: "
        f"{found.new_tokens_per_second:8,.0f} tokens/s; first token {found.first_token_p50:.1f} / "
        f"{found.first_token_p99:.1f} ms, per token {found.per_token_p50:.2f} / {found.per_token_p99:.2f} ms"
        + (f"; {len(errors)} failed: {errors[0]}" if errors else ""),
        flush=True,
    )
    return found


def _percentiles(values: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile of seconds, in milliseconds; zeros if there are none."""
    ordered = [round(1000 * value, 2) for value in sorted(values)] or [0.0]
    return statistics.median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1]


def loads(options: argparse.Namespace, vocab_size: int) -> dict[str, list[Request]]:
    """Return the requests of each load, whose lengths count: `fresh` gives their tokens."""
    return {
        "fixed": [Request([0] * FIXED_PROMPT, FIXED_OUTPUT)] * options.requests,
        "mixed": requests(options.requests, vocab_size),
    }


def fresh(given: list[Request], draw: np.random.Generator, vocab_size: int) -> list[Request]:
    """Return requests of the same lengths with tokens that are drawn anew: a prefix cache must not know them."""
    return [Request(draw.integers(256, vocab_size - 3, len(each.prompt)).tolist(), each.new_tokens) for each in given]


def measure(name: str, folder: Path, options: argparse.Namespace, rates: dict[str, float]) -> Iterator[Result]:
    """Yield the results of a server; `rates` gets its saturation where there is none yet."""
    vocab_size = model_values(options)["vocab_size"]
    draw = np.random.default_rng(1)
    with Server(name, folder, options) as server:
        load = Load(server.port, options.load_processes)
        most = 2 * options.max_batch_size
        chosen = {kind: given for kind, given in loads(options, vocab_size).items() if kind in options.loads}
        for kind, given in chosen.items():
            load.run(fresh(given[: max(1, len(given) // 10)], draw, vocab_size), None, most)
            records, seconds = load.run(fresh(given, draw, vocab_size), None, most)
            saturated = result(name, options, kind, None, records, seconds)
            yield saturated
            rates.setdefault(kind, saturated.requests_per_second)
            for part in options.parts:
                rate = part * rates[kind]
                timed = given[: min(len(given), max(1, int(rate * options.rate_seconds)))]
                records, seconds = load.run(fresh(timed, draw, vocab_size), rate, len(timed))
                yield result(name, options, kind, rate, records, seconds)
        records, seconds = load.run(alone(options, vocab_size), None, 1)
        yield result(name, options, "alone", None, records, seconds)
        load.close()


def alone(options: argparse.Namespace, vocab_size: int) -> list[Request]:
    """Return the requests of one user."""
    given = [Request([0] * FIXED_PROMPT, options.alone_tokens)] * ALONE
    return fresh(given, np.random.default_rng(0), vocab_size)


def measure_session(folder: Path, options: argparse.Namespace) -> list[Result]:
    """Return what one user gets from `Session.stream`."""
    from qwen_model.checkpoints.tokenizer import load_tokenizer

    session = load_random(folder / "engine", options.device)
    session.tokenizer = load_tokenizer(folder / "engine")
    given = alone(options, session.config.model.vocab_size)
    list(session.stream([given[0].prompt[::-1]], max_new_tokens=16))
    records = []
    began = time.perf_counter()
    for request in given:
        sent = time.perf_counter()
        events = session.stream([request.prompt], max_new_tokens=options.alone_tokens)
        arrivals = [time.perf_counter() for _ in events]
        records.append(Record(sent, arrivals, len(arrivals), None))
    return [result("session", options, "alone", None, records, time.perf_counter() - began)]


def model_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return the model's config.json."""
    from benchmarks.generate import COMMON, SHAPES

    values = {**COMMON, **SHAPES[options.shape]}
    return {**values, "num_hidden_layers": options.layers or values["num_hidden_layers"]}


def main() -> None:
    from benchmarks.generate import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("vllm", "qwen_model", "session")
    parser.add_argument("--implementations", nargs="+", choices=names, default=list(names))
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--loads", nargs="+", choices=("fixed", "mixed"), default=["fixed", "mixed"])
    parser.add_argument("--requests", type=int, default=1000, help="of a load (default: %(default)s)")
    parser.add_argument("--parts", nargs="*", type=float, default=[0.5, 0.9], help="of saturation, as request rates")
    parser.add_argument(
        "--saturation",
        nargs="*",
        default=[],
        metavar="LOAD=RATE",
        help="requests a second at saturation, of another run (default: what the first implementation reaches)",
    )
    parser.add_argument("--rate-seconds", type=float, default=30, help="of a run at a rate (default: %(default)s)")
    parser.add_argument("--alone-tokens", type=int, default=256)
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "int8", "fp8"], default="auto", help="ours; fp8: both")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of both servers' layers")
    parser.add_argument("--head-quantization", choices=["int8", "int4", "none"], default="none", help="ours")
    parser.add_argument("--group-size", type=int, default=128, help="with int4; -1: all inputs")
    parser.add_argument("--asymmetric", action="store_true", help="with int4")
    parser.add_argument("--device", default="cuda", help="ours")
    parser.add_argument("--http-processes", type=int, default=0, help="ours (default: the command's)")
    parser.add_argument("--load-processes", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--vllm-arguments", default="", help="more of vLLM's, in one text")
    parser.add_argument("--serve", type=Path, metavar="DIR", help="be our server, of this engine without weights")
    parser.add_argument("--port", type=int, default=8000, help="of --serve")
    parser.add_argument("--results", type=Path, help="default: serving.json or serving_QUANTIZATION.json, in results/")
    options = parser.parse_args()
    options.per_token = options.quantization in EIGHT_BIT_KINDS
    kind = "" if options.quantization is None else f"_{options.quantization}"
    options.results = options.results or RESULTS / f"serving{kind}.json"
    if options.serve is not None:
        sys.exit(serve_ours(options.serve, options.port, options.device, options.http_processes))
    # A time limit's signal ends the servers, too: one that stays would keep the GPU's memory.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    rates = {kind: float(rate) for kind, _, rate in (each.partition("=") for each in options.saturation)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder, model_values(options), options)
        found: list[Result] = []
        for name in options.implementations:
            measured = measure_session(folder, options) if name == "session" else measure(name, folder, options, rates)
            for each in measured:
                found.append(each)
                write_results(options.results, [dataclasses.asdict(each) for each in found])
    print(options.results)


if __name__ == "__main__":
    main()
