"""Test that threads take turns."""

from __future__ import annotations

import threading
import time

from qwen_model.common.turn_lock import TurnLock


def test_a_thread_that_gives_it_up_lets_those_that_wait_go_first() -> None:
    lock, order = TurnLock(), []

    def work(name: str) -> None:
        with lock:
            order.append(name)

    others = [threading.Thread(target=work, args=("other",)) for _ in range(3)]
    with lock:
        for other in others:
            other.start()
        time.sleep(0.1)
    for _ in others:
        with lock:
            order.append("first")
    for other in others:
        other.join()
    assert order[0] == "other"
    assert len(order) == 6


def test_it_may_be_taken_again_by_its_owner_while_others_wait() -> None:
    lock, taken = TurnLock(), threading.Event()

    def work() -> None:
        with lock:
            taken.set()

    other = threading.Thread(target=work)
    with lock:
        other.start()
        time.sleep(0.05)
        with lock:
            assert not taken.is_set()
        time.sleep(0.05)
        assert not taken.is_set()
    assert taken.wait(10)
    other.join()
