"""What a benchmark counts: the arithmetic of latencies and rates, batches, and rows that say why there is no number."""

import random
import threading
import time

import pytest

from qwen_model.common.errors import OutOfMemoryError, QwenModelError
from qwen_model.evaluation import load, throughput
from qwen_model.evaluation.load import Record, run_batches, run_requests
from qwen_model.evaluation.throughput import Percentiles, draw, markdown, measure_batches, row
from qwen_model.evaluation.workload import Request

REQUESTS = [Request([1] * length, new) for length, new in ((3, 2), (4, 6), (5, 4), (6, 1), (7, 3))]


def no_progress(heading):
    return None


class FakeTarget:
    """Count its calls, and take a tick of a clock for each step."""

    def __init__(self, monkeypatch, most=None, missing=0):
        self.calls, self.most, self.missing, self.now = [], most, missing, 0.0
        monkeypatch.setattr(load.time, "perf_counter", lambda: self.now)

    def generate(self, prompts, new_tokens, on_step):
        if self.most is not None and len(prompts) > self.most:
            raise OutOfMemoryError("Tried to allocate\n9 GiB")
        self.calls.append((len(prompts), new_tokens))
        for _ in range(new_tokens - self.missing):
            self.now += 1.0
            on_step()


def test_latencies_of_a_request():
    record = Record(prompt_tokens=7, generated_tokens=5, sent=10.0, arrivals=[12.0, 12.5, 14.0])
    assert record.first_token_seconds == 2.0
    assert record.seconds_per_token == pytest.approx((14.0 - 12.0) / 4)  # five tokens came in three events
    assert record.gaps == [0.5, 1.5]


def test_a_single_token_has_no_time_per_token():
    assert Record(7, 1, 10.0, [12.0]).seconds_per_token is None
    assert Record(7, 1, 10.0, [12.0]).gaps == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], (4.0, 4.0, 4.0)),
        ([2.0, 1.0], (1.0, 2.0, 2.0)),
        ([5.0, 1.0, 3.0, 2.0, 4.0], (3.0, 5.0, 5.0)),
        ([float(value) for value in range(1, 101)], (50.0, 90.0, 99.0)),
        ([float(value) for value in range(1, 11)], (5.0, 9.0, 10.0)),
    ],
)
def test_percentiles_are_values_that_were_measured(values, expected):
    found = Percentiles.of(values)
    assert (found.p50, found.p90, found.p99) == expected
    assert found.count == len(values)


def test_percentiles_of_nothing():
    assert Percentiles.of([]) is None


def test_batches_run_to_their_longest_request_and_count_what_was_asked_for(monkeypatch):
    target = FakeTarget(monkeypatch)
    done = []
    records, seconds = run_batches(target, REQUESTS, 2, progress=lambda *counts: done.append(counts))
    warm_up, measured = target.calls[:2], target.calls[2:]
    assert warm_up == [(2, 4), (1, 3)]  # each size of batch, few tokens
    assert measured == [(2, 6), (2, 4), (1, 3)]
    assert seconds == 6 + 4 + 3
    assert [(record.prompt_tokens, record.generated_tokens) for record in records] == [
        (3, 2),
        (4, 6),
        (5, 4),
        (6, 1),
        (7, 3),
    ]
    assert [len(record.arrivals) for record in records] == [2, 6, 4, 1, 3]
    assert {record.first_token_seconds for record in records} == {1.0}
    assert done == [(2, 5), (4, 5), (5, 5)]


def test_tokens_that_did_not_come_are_an_error(monkeypatch):
    with pytest.raises(QwenModelError, match="2 tokens were asked for each prompt, 1 came"):
        run_batches(FakeTarget(monkeypatch, missing=1), [Request([1], 2)], 1)


def test_rates(monkeypatch):
    records, seconds = run_batches(FakeTarget(monkeypatch), REQUESTS, 2)
    found = row("fake", 2, records, seconds)
    assert found.rates.requests == pytest.approx(5 / 13)
    assert found.rates.generated_tokens == pytest.approx(16 / 13)
    assert found.rates.total_tokens == pytest.approx((16 + 25) / 13)
    assert found.per_token_ms.count == 4  # one request asks for a single token
    assert found.between_tokens_ms.p99 == pytest.approx(1000.0)


def test_memory_that_ends_is_the_last_row(monkeypatch):
    rows = measure_batches("fake", FakeTarget(monkeypatch, most=2), REQUESTS, [4, 1, 2, 5], no_progress)
    assert [found.concurrency for found in rows] == [1, 2, 4]
    assert rows[-1].note == "out of memory: Tried to allocate 9 GiB"
    assert rows[-1].rates is None
    assert "| fake           | 4     | -          | -                  |" in markdown(rows)


def test_batches_that_cannot_be_are_rows_that_say_so(monkeypatch):
    rows = measure_batches("fake", FakeTarget(monkeypatch), REQUESTS, [1, 4, 8], no_progress, largest_batch=2)
    assert [found.rates is None for found in rows] == [False, True, True]
    assert "limit of 2" in rows[1].note
    assert "only 5 prompts" in rows[2].note


def test_failed_requests_are_counted_and_left_out_of_the_rates():
    good = Record(4, 2, 0.0, [1.0, 2.0])
    bad = [Record(4, 0, 0.0, [], "HTTP 500"), Record(4, 0, 0.0, [], "HTTP 500"), Record(4, 0, 0.0, [], "timed out")]
    found = row("server", None, [good, *bad], 2.0)
    assert (found.requests, found.failed, found.rates.generated_tokens) == (1, 3, 1.0)
    assert found.note == "3 of 4 requests failed: HTTP 500"
    assert row("server", None, bad, 2.0).rates is None


def answered(request):
    now = time.perf_counter()
    return Record(len(request.prompt), request.new_tokens, now, [now])


def test_concurrency_is_reached_and_not_exceeded():
    under_way, most, lock = 0, 0, threading.Lock()
    three = threading.Barrier(3, timeout=30)  # breaks unless three requests are under way together

    class Target:
        def send(self, request):
            nonlocal under_way, most
            with lock:
                under_way += 1
                most = max(most, under_way)
            three.wait()
            with lock:
                under_way -= 1
            return answered(request)

    requests = REQUESTS[:3] * 3
    records, _ = run_requests(Target(), requests, max_concurrency=3)
    assert most == 3
    assert [record.prompt_tokens for record in records] == [len(request.prompt) for request in requests]


def test_requests_come_at_their_rate():
    class Target:
        def send(self, request):
            return answered(request)

    gaps = random.Random(1)
    waited = sum(gaps.expovariate(100.0) for _ in REQUESTS[1:])
    _, seconds = run_requests(Target(), REQUESTS, request_rate=100.0, seed=1)
    assert seconds >= waited > 0.02


def test_a_plot_is_written_whole(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    rows = measure_batches("fake", FakeTarget(monkeypatch, most=2), REQUESTS, [1, 2, 4], no_progress)
    draw(rows, "title", tmp_path / "plot.svg")
    assert "generated tokens/s" in (tmp_path / "plot.svg").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["plot.svg"]


def test_numbers_have_three_digits():
    assert [throughput._number(value) for value in (1234.5, 12.345, 0.12345, 0.0)] == ["1234", "12.3", "0.123", "0"]
