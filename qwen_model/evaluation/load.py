"""Generate load, and record when each token comes: batch after batch, or requests that are under way together.

What is driven is apart from the load: an engine and transformers are `BatchTarget`s, a server is a `RequestTarget`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from ..common.errors import QwenModelError
from .workload import Request

WARM_UP_TOKENS = 4
Progress = Callable[[int, int], None]
"""Called with the requests that are done, and their number."""


@dataclass(frozen=True)
class Record:
    """Hold what happened to one request; times are seconds of `time.perf_counter`.

    sent: when the request was sent; of a batch, when it began.
    arrivals: when tokens arrived. A server may send several tokens at once: these are then fewer than the tokens.
    error: why the request failed; None if it did not.
    """

    prompt_tokens: int
    generated_tokens: int
    sent: float
    arrivals: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def first_token_seconds(self) -> float:
        """Return the time from sending to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def seconds_per_token(self) -> float | None:
        """Return (last - first) / (tokens - 1), the mean time of a token after the first; None for a single token."""
        if self.generated_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.generated_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Return the time between each arrival and the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


class BatchTarget(Protocol):
    """Generate for one batch at a time."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int, on_step: Callable[[], None]) -> None:
        """Generate exactly `new_tokens` tokens for each prompt.

        on_step: to be called when the tokens of a step, one of each prompt, are on the host.
        """


class RequestTarget(Protocol):
    """Take requests at any time, from several threads."""

    def send(self, request: Request) -> Record:
        """Send a request and return when it is done; a failure is in the record, not raised."""


def run_batches(
    target: BatchTarget, requests: Sequence[Request], batch_size: int, progress: Progress | None = None
) -> tuple[list[Record], float]:
    """Run the requests in batches, in their order; return their records and the seconds of all.

    A batch runs until its longest request is done, as static batches do; the tokens beyond what a request asked for are
    not counted. A short run of each size of batch comes first, so that no one-time work is measured.
    """
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    for batch in {len(batch): batch for batch in batches}.values():
        _run_batch(target, [Request(r.prompt, min(r.new_tokens, WARM_UP_TOKENS)) for r in batch])
    records: list[Record] = []
    began = time.perf_counter()
    for batch in batches:
        records += _run_batch(target, batch)
        if progress is not None:
            progress(len(records), len(requests))
    return records, time.perf_counter() - began


def _run_batch(target: BatchTarget, batch: Sequence[Request]) -> list[Record]:
    steps: list[float] = []
    longest = max(request.new_tokens for request in batch)
    sent = time.perf_counter()
    target.generate([request.prompt for request in batch], longest, lambda: steps.append(time.perf_counter()))
    if len(steps) != longest:
        raise QwenModelError(f"{longest} tokens were asked for each prompt, {len(steps)} came")
    return [Record(len(r.prompt), r.new_tokens, sent, steps[: r.new_tokens]) for r in batch]


def run_requests(
    target: RequestTarget,
    requests: Sequence[Request],
    max_concurrency: int | None = None,
    request_rate: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[Record], float]:
    """Send the requests, in their order; return their records and the seconds until the last is done.

    max_concurrency: the most requests under way; others wait, which is not part of their times. None: no limit.
    request_rate: requests a second, in a Poisson process drawn with `seed`. None: all at once.
    """
    random_gap = random.Random(seed)
    lock, records = threading.Lock(), []

    def send(request: Request) -> Record:
        record = target.send(request)
        with lock:
            records.append(record)
            if progress is not None:
                progress(len(records), len(requests))
        return record

    began = time.perf_counter()
    with ThreadPoolExecutor(max_concurrency or len(requests)) as pool:
        pending = []
        due = began
        for request in requests:
            if request_rate is not None:
                time.sleep(max(0.0, due - time.perf_counter()))
                due += random_gap.expovariate(request_rate)
            pending.append(pool.submit(send, request))
        done = [future.result() for future in pending]
    return done, time.perf_counter() - began
