"""The predicted wait for a place in the queue."""

from __future__ import annotations

from tfserve.engine.frontend.finish_pace import FinishPace


def test_the_wait_follows_the_finishes() -> None:
    pace = FinishPace(0.0)
    for now_s in range(2, 402, 2):
        pace.on_finish(now_s)
    assert 9.9 < pace.wait_s(5) < 10.1


def test_idle_time_does_not_lengthen_the_predicted_wait() -> None:
    pace = FinishPace(0.0)
    for now_s in range(1, 100):
        pace.on_finish(now_s)
    pace.on_work(50_000.0)
    pace.on_finish(50_001.0)
    assert pace.wait_s(3) < 3.1


def test_the_wait_is_a_second_at_least() -> None:
    pace = FinishPace(0.0)
    for _ in range(100):
        pace.on_finish(0.0)
    assert pace.wait_s(10) == 1.0
