"""Send thousands of requests of random lengths through one session: neither memory nor results may change.

    python -m benchmarks.soak [--backend tensorrt] [--requests 20000] [--concurrent 32] [--deterministic]

The model is the packaged one. Requests overlap, each of them one to eight prompts, greedily or sampled with a seed; one
in twenty is refused (a prompt too long), and a tenth is closed half-way. Each result is compared with that of the same
request alone. Exits with 1 if memory has grown, a page of the cache is lost, or a result differs with --deterministic
or --concurrent 1; else a result may differ, since kernels may add in another order.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, write_results
from qwen_model import QwenModelError, SamplingOptions, Session, build_engine, load_engine
from qwen_model.engine.results import StreamEvent
from qwen_model.interface.engine_config import Limits

DISTINCT = 64
LIMITS = Limits(max_batch_size=64, max_input_len=512, max_output_len=32)
MOST_PROMPTS = 8
ALLOWED_GROWTH = 16 << 20
"""Bytes of the process and of the device, from the first report on: allocators keep varying amounts."""


@dataclass(frozen=True)
class Request:
    """A Request holds prompts, and how to continue them."""

    prompts: list[list[int]]
    max_new_tokens: int
    sampling: SamplingOptions | None

    @classmethod
    def make(cls, source: random.Random, vocab_size: int) -> Request:
        """Make a random request."""
        count = source.randint(1, MOST_PROMPTS)
        longest = source.choice([8, 64, LIMITS.max_input_len])  # mostly short ones
        prompts = [source.choices(range(vocab_size), k=source.randint(1, longest)) for _ in range(count)]
        sampling = None
        if source.random() < 0.3:
            sampling = SamplingOptions(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=source.randrange(2**31))
        return cls(prompts, source.randint(1, LIMITS.max_output_len), sampling)

    def stream(self, session: Session) -> Iterator[StreamEvent]:
        """Begin to generate."""
        return session.stream(self.prompts, max_new_tokens=self.max_new_tokens, sampling=self.sampling)


@dataclass
class Running:
    """A Running holds a request that overlaps with others: its stream, and the new tokens of each prompt so far."""

    place: int
    stream: Iterator[StreamEvent]
    tokens: list[list[int]]
    left: int | None = None  # tokens until it is given up; None: it is not

    @classmethod
    def begin(cls, session: Session, request: Request, place: int, left: int | None = None) -> Running:
        """Begin a request."""
        return cls(place, request.stream(session), [[] for _ in request.prompts], left)

    def advance(self) -> bool:
        """Take a token; return False if there is none, or the request is given up."""
        if self.left == 0:
            self.stream.close()  # type: ignore[attr-defined]
            return False
        event = next(self.stream, None)
        if event is not None:
            self.tokens[event.index].append(event.token_id)
            self.left = None if self.left is None else self.left - 1
        return event is not None


def fail(session: Session) -> None:
    """Send a request that is refused."""
    try:
        session.generate([[1] * (LIMITS.max_input_len + 1)])
    except QwenModelError:
        return
    raise AssertionError("a prompt that is too long was taken")


def device_bytes(session: Session) -> int | None:
    """Return the memory in use on the session's GPU, None on a CPU."""
    device: Any = session.device
    if session.config.backend == "tensorrt":
        from qwen_model.backends.tensorrt.cuda_runtime import memory_info, on_device

        with on_device(device.device):
            free, total = memory_info()
        return total - free
    import torch

    if device.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device.device)
    return total - free


def process_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def soak(session: Session, requests: int, concurrent: int) -> dict[str, Any]:
    """Run `requests` requests; return memory over time, and how many results differed from those alone."""
    source = random.Random(0)
    distinct = [Request.make(source, session.config.model.vocab_size) for _ in range(DISTINCT)]
    expected = []
    for request in distinct:
        alone = Running.begin(session, request, 0)
        while alone.advance():
            pass
        expected.append(alone.tokens)
    running: list[Running] = []
    seen, different, done, start = [], 0, 0, time.perf_counter()
    while done < requests:
        while len(running) < min(concurrent, requests - done):
            place = source.randrange(DISTINCT)
            running.append(
                Running.begin(session, distinct[place], place, source.randint(1, 40) if source.random() < 0.1 else None)
            )
        each = running[source.randrange(len(running))]
        if each.advance():
            continue
        running.remove(each)
        done += 1
        different += each.left is None and each.tokens != expected[each.place]
        if source.random() < 0.05:
            fail(session)
        if done % max(1, requests // 10) == 0:
            memory = {"requests": done, "device_bytes": device_bytes(session), "process_bytes": process_bytes()}
            seen.append({**memory, "seconds": time.perf_counter() - start, "different": different})
            print(seen[-1], flush=True)
    return {
        "backend": session.config.backend,
        "requests": requests,
        "concurrent": concurrent,
        "different": different,
        "lost_pages": lost_pages(session),
        "memory": seen,
    }


def lost_pages(session: Session) -> int:
    """Return how many pages of the cache are in use when nothing runs."""
    while session.scheduler.has_work:
        session.scheduler.step()
    return session.device.num_pages - 1 - session.scheduler.pool.num_free


def grown(memory: list[dict[str, Any]]) -> bool:
    """Tell whether the last report exceeds the first by more than ALLOWED_GROWTH."""
    return any(
        memory[0][name] is not None and memory[-1][name] - memory[0][name] > ALLOWED_GROWTH
        for name in ("device_bytes", "process_bytes")
    )


def new_session(options: argparse.Namespace) -> Session:
    """Build an engine of the packaged model and load it."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "engine"
        build_engine(
            output_dir=engine,
            backend=options.backend,
            dtype=options.dtype,
            max_batch_size=LIMITS.max_batch_size,
            max_input_len=LIMITS.max_input_len,
            max_output_len=LIMITS.max_output_len,
        )
        return load_engine(engine, device=options.device, deterministic=options.deterministic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--concurrent", type=int, default=32, help="requests that overlap (default: %(default)s)")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    try:
        session = new_session(options)
    except QwenModelError as error:
        sys.exit(str(error))
    found = soak(session, options.requests, options.concurrent)
    path = options.results or RESULTS / f"soak_{options.backend}.json"
    write_results(path, found)
    print(path)
    exact = options.deterministic or options.concurrent == 1
    if (found["different"] and exact) or found["lost_pages"] or grown(found["memory"]):
        sys.exit("results differ from those alone, pages are lost, or memory has grown")


if __name__ == "__main__":
    main()
