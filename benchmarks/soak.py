"""Send thousands of requests of random lengths through one session: neither memory nor results may change.

    python -m benchmarks.soak [--backend tensorrt] [--requests 10000]

The model is the packaged one. Most requests generate, greedily or sampled with a seed; some fail (prompts too long) and
some are streams that are closed half-way. Each result is compared with the first result of the same request. Exits with
1 if a result differs or memory has grown.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, write_results
from qwen_model import QwenModelError, SamplingOptions, Session, build_engine, load_engine
from qwen_model.interface.engine_config import Limits

DISTINCT = 64
LIMITS = Limits(max_batch_size=8, max_input_len=512, max_output_len=32)
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
        count = source.randint(1, LIMITS.max_batch_size)
        longest = source.choice([8, 64, LIMITS.max_input_len])  # mostly short ones
        prompts = [source.choices(range(vocab_size), k=source.randint(1, longest)) for _ in range(count)]
        sampling = None
        if source.random() < 0.3:
            sampling = SamplingOptions(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=source.randrange(2**31))
        return cls(prompts, source.randint(1, LIMITS.max_output_len), sampling)

    def run(self, session: Session) -> list[list[int]]:
        """Generate, and return the new tokens of each prompt."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "sampling": self.sampling}
        return [output.output_ids for output in session.generate(self.prompts, **settings).outputs]


def fail(session: Session) -> None:
    """Send a request that is refused."""
    try:
        session.generate([[1] * (LIMITS.max_input_len + 1)])
    except QwenModelError:
        return
    raise AssertionError("a prompt that is too long was taken")


def give_up(session: Session, request: Request, tokens: int) -> None:
    """Open a stream and close it after some tokens."""
    stream = session.stream(request.prompts, max_new_tokens=LIMITS.max_output_len, sampling=request.sampling)
    for _ in islice(stream, tokens):
        pass
    stream.close()  # type: ignore[attr-defined]


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


def soak(session: Session, requests: int) -> dict[str, Any]:
    """Run `requests` requests; return memory over time, and how many results differed from the first."""
    source = random.Random(0)
    vocab_size = session.config.model.vocab_size
    distinct = [Request.make(source, vocab_size) for _ in range(DISTINCT)]
    expected = [request.run(session) for request in distinct]
    seen, different, start = [], 0, time.perf_counter()
    for count in range(1, requests + 1):
        place = source.randrange(DISTINCT)
        if count % 10 == 0:
            fail(session)
        elif count % 7 == 0:
            give_up(session, distinct[place], source.randint(1, 40))
        else:
            different += distinct[place].run(session) != expected[place]
        if count % max(1, requests // 10) == 0:
            memory = {"requests": count, "device_bytes": device_bytes(session), "process_bytes": process_bytes()}
            seen.append({**memory, "seconds": time.perf_counter() - start, "different": different})
            print(seen[-1], flush=True)
    return {"backend": session.config.backend, "requests": requests, "different": different, "memory": seen}


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
        return load_engine(engine, device=options.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype")
    parser.add_argument("--device")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    try:
        session = new_session(options)
    except QwenModelError as error:
        sys.exit(str(error))
    found = soak(session, options.requests)
    path = options.results or RESULTS / f"soak_{options.backend}.json"
    write_results(path, found)
    print(path)
    if found["different"] or grown(found["memory"]):
        sys.exit("results differ from the first ones, or memory has grown")


if __name__ == "__main__":
    main()
