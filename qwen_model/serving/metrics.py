"""Count what the engine does, for /metrics: Prometheus's text, with vLLM's names where they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.extras import import_extra
from ..interface.engine_config import EngineConfig

if TYPE_CHECKING:
    from ..engine.scheduler import Scheduler

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


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
        self._preemptions = gauge("vllm:num_preemptions_total", "Sequences whose pages were taken", registry=registry)
        self._prompt = counter("vllm:prompt_tokens", "Tokens of prompts", registry=registry)
        self._generated = counter("vllm:generation_tokens", "Generated tokens", registry=registry)
        self._success = counter("vllm:request_success", "Ended sequences", ["finished_reason"], registry=registry)
        self.refused = counter("qwen_model:requests_refused", "Sequences refused with 429", registry=registry)
        seconds = {"buckets": SECONDS, "registry": registry}
        self._first = histogram("vllm:time_to_first_token_seconds", "From arrival", **seconds)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence", **seconds)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From arrival to the end", **seconds)
        self._step = histogram("qwen_model:step_seconds", "Of one step of the scheduler", **seconds)
        self._prompt_sizes = histogram(
            "vllm:request_prompt_tokens", "Tokens of a prompt", buckets=TOKENS, registry=registry
        )
        self._output_sizes = histogram(
            "vllm:request_generation_tokens", "Tokens of an output", buckets=TOKENS, registry=registry
        )

    def added(self, prompt_tokens: int) -> None:
        """Count a sequence that was added."""
        self._prompt.inc(prompt_tokens)
        self._prompt_sizes.observe(prompt_tokens)

    def token(self, seconds: float, first: bool) -> None:
        """Count a token, which came so long after the one before, or after its sequence was added."""
        self._generated.inc()
        (self._first if first else self._between).observe(seconds)

    def step(self, seconds: float) -> None:
        """Count a step of the scheduler."""
        self._step.observe(seconds)

    def ended(self, reason: str, tokens: int, seconds: float) -> None:
        """Count a sequence that has ended."""
        self._success.labels(reason).inc()
        self._output_sizes.observe(tokens)
        self._whole.observe(seconds)

    def text(self, scheduler: Scheduler) -> str:
        """Return all of it as Prometheus's text."""
        self._requests_running.set(scheduler.num_running)
        self._requests_waiting.set(scheduler.num_waiting)
        self._cache.set(1 - scheduler.pool.num_free / (scheduler.pool.num_pages - 1))
        self._preemptions.set(scheduler.num_preemptions)
        text: str = self._latest(self._registry).decode()
        return text
