"""A step's time and the idle time before it, by the events around it."""

from __future__ import annotations

from dataclasses import dataclass

from tfserve.model.runner.cuda_stream_runner import TimedFlight
from tfserve.plan import StepId, StepResult


class Flight:
    def result(self) -> StepResult:
        return StepResult(StepId(7), (5,), (None,), device_s=9.0, idle_s=9.0)


@dataclass
class Event:
    """An event at a time in milliseconds, reached after a wait for it."""

    at_ms: float
    reached: bool = False

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, end: Event) -> float:
        assert end.reached or self.at_ms >= end.at_ms - 100
        return end.at_ms - self.at_ms


def test_times_are_the_devices() -> None:
    first, second = (Event(10.0), Event(15.0)), (Event(15.5), Event(21.5))
    results = [
        TimedFlight(Flight(), before, *events).result() for before, events in ((None, first), (first[1], second))
    ]
    assert [(result.device_s, result.idle_s) for result in results] == [(0.005, 0.0), (0.006, 0.0005)]
    assert results[1].tokens == (5,)


def test_its_result_waits_for_the_end_of_the_device() -> None:
    end = Event(2.0)
    assert TimedFlight(Flight(), None, Event(1.0), end).result().step == 7
    assert end.reached
