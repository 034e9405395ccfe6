"""Count what the engine does, for /metrics: Prometheus's text, with vLLM's names where they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.extras import import_extra
from ..interface.engine_config import EngineConfig

if TYPE_CHECKING:
    from ..engine.scheduler import Scheduler

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


class _Seconds:
    """Collect a histogram of seconds, those of a whole step at once: the library's takes one value at a time."""

    def __init__(self, name: str, text: str):
        library = import_extra("prometheus_client.core", "the server", "serve")
        self._new_family = partial(library.HistogramMetricFamily, name, text)
        self._counts = np.zeros(len(SECONDS) + 1, np.int64)
        self._sum = 0.0

    def observe(self, seconds: Sequence[float]) -> None:
        """Count values."""
        if seconds:
            self._counts += np.bincount(np.searchsorted(SECONDS, seconds), minlength=len(self._counts))
            self._sum += sum(seconds)

    def collect(self) -> Iterator[Any]:
        """Yield the histogram, for the registry."""
        bounds = [*map(str, SECONDS), "+Inf"]
        family = self._new_family()
        family.add_metric([], list(zip(bounds, np.cumsum(self._counts).tolist(), strict=True)), self._sum)
        yield family


class EngineMetrics:
    """Hold the counters of an engine's process."""

    def __init__(self, config: EngineConfig):
        """Make the counters."""
        prometheus = import_extra("prometheus_client", "the server", "serve")
        self._latest = prometheus.generate_latest
        self._registry = registry = prometheus.CollectorRegistry()
        gauge, counter, histogram = prometheus.Gauge, prometheus.Counter, prometheus.Histogram
        self._requests_running = gauge("vllm:num_requests_running", "Sequences in the batch", registry=registry)
        self._requests_waiting = gauge("vllm:num_requests_waiting", "Sequences that wait", registry=registry)
        self._cache = gauge("vllm:kv_cache_usage_perc", "Pages in use, 1 is all", registry=registry)
        self._preemptions = counter("vllm:num_preemptions", "Sequences whose pages were taken", registry=registry)
        self._counted_preemptions = 0
        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts", registry=registry)
        self._generated = counter("vllm:generation_tokens", "Generated tokens", registry=registry)
        self._success = counter("vllm:request_success", "Ended sequences", ["finished_reason"], registry=registry)
        self.refused = counter("qwen_model:requests_refused", "Sequences refused with 429", registry=registry)
        seconds = {"buckets": SECONDS, "registry": registry}
        self._first = _Seconds("vllm:time_to_first_token_seconds", "From arrival")
        self._between = _Seconds("vllm:inter_token_latency_seconds", "Between two tokens of a sequence")
        registry.register(self._first)
        registry.register(self._between)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end", **seconds)
        self._step = histogram("qwen_model:step_seconds", "Of one step of the scheduler", **seconds)
        self._prompt_sizes = histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt", buckets=TOKENS, registry=registry
        )
        self._output_sizes = histogram(
            "vllm:request_generation_tokens", "Tokens of an output", buckets=TOKENS, registry=registry
        )

    def added(self, prompt_tokens: int, count: int = 1) -> None:
        """Count sequences of one prompt that were added."""
        self._prompt.inc(prompt_tokens * count)
        for _ in range(count):
            self._prompt_sizes.observe(prompt_tokens)

    def tokens(self, first: Sequence[float], between: Sequence[float]) -> None:
        """Count the tokens of a step: the seconds after their sequence was added, or after the token before."""
        self._generated.inc(len(first) + len(between))
        self._first.observe(first)
        self._between.observe(between)

    def step(self, seconds: float) -> None:
        """Count a step of the scheduler."""
        self._step.observe(seconds)

    def ended(self, reason: str, tokens: int, seconds: float, count: int = 1) -> None:
        """Count sequences that have ended alike."""
        for _ in range(count):
            self._success.labels(reason).inc()
            self._output_sizes.observe(tokens)
            self._whole.observe(seconds)

    def text(self, scheduler: Scheduler) -> str:
        """Return all of it as Prometheus's text."""
        self._requests_running.set(scheduler.num_running)
        self._requests_waiting.set(scheduler.num_waiting)
        self._cache.set(1 - scheduler.pool.num_free / (scheduler.pool.num_pages - 1))
        self._preemptions.inc(scheduler.num_preemptions - self._counted_preemptions)
        self._counted_preemptions = scheduler.num_preemptions
        text: str = self._latest(self._registry).decode()
        return text
